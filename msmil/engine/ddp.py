"""DDP as an engine: every rank holds everything, gradients are averaged in the last micro-step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from msmil.engine.optim import load_optimizer_tensors, optimizer_tensors
from msmil.engine.runtime import Runtime


class DdpEngine:
    """Trains the parameters of `module` that require a gradient.

    Args:
        runtime: this process among the others.
        module: the bare network, on the device.
        optimizer: over its trainable parameters.
        moments: Adam's, by parameter name; a parameter without any starts fresh.
        loss_scale: of fp16, to go on with.
        compiled: torch.compile the training forward.
    """

    divides_weights = False

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        moments: dict[str, Tensor],
        loss_scale: Mapping[str, Any] | None,
        compiled: bool,
    ) -> None:
        self.runtime, self.module = runtime, module
        load_optimizer_tensors(module, optimizer, moments)
        self._bare_optimizer = optimizer
        self._prepared, self._optimizer = runtime.prepare(module, optimizer)
        # training alone is compiled: evaluation calls the bare module, in shapes and modes of its own
        self._called = torch.compile(self._prepared) if compiled else self._prepared
        self.load_loss_scale(loss_scale)

    def settle(self, forward: Callable[[], Tensor]) -> None:
        """Do a backward whose gradients are thrown away, so that DDP's buckets have their lasting order.

        DDP rebuilds its buckets after its first backward; from then on gradients are summed in another order. Done at
        every start, an unbroken run and a resumed one sum alike, to the last bit. Statistics of norms are put back.
        """
        if self.runtime.world == 1:
            return
        before = [buffer.clone() for buffer in self.module.buffers()]
        loss = forward()
        with self.runtime.waiting():
            self.backward(loss)
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(value)
        self._optimizer.zero_grad()

    def __call__(self, **arguments: Any) -> Any:
        """Forward, in the precision of the configuration."""
        return self._called(**arguments)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients only in the last micro-step."""
        return self.runtime.accumulate(self._prepared, last=last)

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss that is this rank's share of the global sum.

        DDP averages gradients over ranks; the loss is a sum over ranks divided by a constant, hence the factor.
        """
        self.runtime.accelerator.backward(loss * self.runtime.world)

    def update(self, largest_norm: float, *, may_overflow: bool) -> tuple[float, bool]:
        """Clip to the largest norm (0: no clipping) and step; (norm before clipping, whether nothing was changed).

        A norm that is not finite changes nothing. fp16 (`may_overflow`) skips such steps itself.
        """
        parameters = [p for p in self._prepared.parameters() if p.requires_grad]
        largest = largest_norm if largest_norm > 0 else float("inf")
        norm = float(self.runtime.accelerator.clip_grad_norm_(parameters, largest))
        if not may_overflow and not torch.tensor(norm).isfinite():
            return norm, True
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, bool(self._optimizer.step_was_skipped)

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by parameter name."""
        return optimizer_tensors(self.module, self._bare_optimizer)

    def weights(self) -> dict[str, Tensor]:
        """The module's state: whole parameters and buffers."""
        return self.module.state_dict()

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of fp16's loss scaling, None in other precisions."""
        scaler = self.runtime.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_loss_scale(self, state: Mapping[str, Any] | None) -> None:
        """Go on with a saved loss scale."""
        scaler = self.runtime.accelerator.scaler
        if scaler is not None and state is not None:
            scaler.load_state_dict(dict(state))

    def close(self) -> None:
        """Let go of the module, which is bare again."""
        self.runtime.release(self._prepared)
