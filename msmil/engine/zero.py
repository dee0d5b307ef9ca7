"""DeepSpeed as an engine: moments, gradients and weights may be divided among the ranks (ZeRO stages 0 to 3).

What is saved is put together from the parts that ranks hold, by parameter name, so that it fits any
engine and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from msmil.engine.loss_scale import LossScale
from msmil.engine.optim import load_optimizer_tensors, optimizer_tensors
from msmil.engine.runtime import Runtime
from msmil.types import BagOutput

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """Trains the parameters of `module` that require a gradient; the arguments are those of DdpEngine.

    fp16 is torch's autocast and a loss scale of ours: DeepSpeed's own mode casts the weights.

    After `close` the module cannot be used any more: its weights were views of DeepSpeed's buffers.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        moments: dict[str, Tensor],
        fp16: bool,
        loss_scale: Mapping[str, Any] | None,
        stage: int,
        accumulation: int,
        clip_grad_norm: float,
    ) -> None:
        self.runtime, self.module = runtime, module
        self.divides_weights = stage == 3
        self._stage, self._accumulation = stage, accumulation
        self._base = optimizer
        self._scale = LossScale(loss_scale) if fp16 else None
        module.to(memory_format=torch.contiguous_format)  # its buffers know no other
        if stage == 0:
            load_optimizer_tensors(module, optimizer, moments)
        runtime.accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip_grad_norm
        if self.divides_weights:  # DeepSpeed's hooks find tensors in a dict, not in a class of ours; see __call__
            module.register_forward_hook(lambda _module, _inputs, output: vars(output))
        self._engine, _ = runtime.prepare(_Autocast(runtime, module) if fp16 else module, optimizer)
        self._zero: Any = self._engine.optimizer
        if stage > 0:
            self._load(moments)

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of fp16's loss scaling, None in other precisions."""
        return None if self._scale is None else self._scale.state_dict()

    def settle(self, forward: Callable[[], Tensor]) -> None:
        """Nothing: ZeRO's buckets follow the order of parameters from the first step on."""

    def __call__(self, **arguments: Any) -> BagOutput:
        """Forward, in the precision of the configuration."""
        output = self._engine(**arguments)
        return BagOutput(**output) if self.divides_weights else output

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """DeepSpeed counts micro-steps itself."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss that is this rank's share of the global sum.

        DeepSpeed averages over ranks and micro-steps, and ours is a sum over both, hence the factor.
        """
        loss = loss * (self.runtime.world * self._accumulation)
        if self._scale is not None:
            if self._stage == 0:
                loss = loss * self._scale.value
            else:
                self._zero.override_loss_scale(self._scale.value)  # it divides gradients by it before it clips
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-step; the last one is done by `update`

    def update(self, largest_norm: float, *, may_overflow: bool) -> tuple[float, bool]:
        """Clip (the bound is in DeepSpeed's configuration) and step; as DdpEngine.update."""
        norm, skipped = self._update_whole() if self._stage == 0 else self._update_parts()
        if self._scale is not None:
            assert may_overflow
            self._scale.update(overflowed=skipped)
        return norm, skipped

    def _update_parts(self) -> tuple[float, bool]:
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.skipped_steps > skipped_before

    def _update_whole(self) -> tuple[float, bool]:
        """Of stage 0, where DeepSpeed looks at no norm."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._scale is not None:
            torch._foreach_div_(gradients, self._scale.value)
        norm = nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            self._engine.step()
            return float(norm), False
        self._engine.zero_grad()
        self._engine.micro_steps += 1  # as its step counts them
        return float(norm), True

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by parameter name, whole. All ranks have to call it."""
        if self._stage == 0:
            return optimizer_tensors(self.module, self._base)
        with self.runtime.waiting():
            return self._whole_moments()

    def _whole_moments(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        found: dict[str, Tensor] = {}
        for parameters, flat in self._groups():
            state = self._base.state.get(flat, {})
            if not state:
                continue  # before the first step
            for parameter in parameters:
                for key in _MOMENTS:
                    found[f"{names[id(parameter)]}/{key}"] = self._whole(parameter, state[key], key)
                found[f"{names[id(parameter)]}/step"] = torch.tensor(float(state["step"]))
        return found

    def weights(self) -> dict[str, Tensor]:
        """The module's state: whole parameters and buffers. All ranks have to call it."""
        if not self.divides_weights:
            return self._copies()
        import deepspeed

        with self.runtime.waiting():
            self._zero.empty_partition_cache()  # a forward without a backward may leave some under way
            with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
                return self._copies()

    def _copies(self) -> dict[str, Tensor]:
        # weights are views of one buffer, which a file must not hold once for each of them
        return {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks."""
        self._engine.destroy()
        self.runtime.accelerator.free_memory()

    def _groups(self) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
        """The parameters of each flat fp32 tensor that this rank updates."""
        if self.divides_weights:
            yield from zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True)
        else:
            yield from zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True)

    def _whole(self, parameter: nn.Parameter, moment: Tensor, key: str) -> Tensor:
        if self.divides_weights:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(parameter, key).detach().clone()  # type: ignore[no-any-return]
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.runtime.device)
        if (places := _places(parameter)) is not None:
            inside, flat = places
            whole[inside] = moment[flat].to(whole.device)
        return self.runtime.sum(whole).view(parameter.shape)

    def _load(self, moments: dict[str, Tensor]) -> None:
        """Cut saved moments into the parts of this rank; a parameter without any starts fresh."""
        if not moments:
            return
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for parameters, flat in self._groups():
            saved = [names[id(p)] for p in parameters if f"{names[id(p)]}/step" in moments]
            if not saved:
                continue
            steps = {float(moments[f"{name}/step"]) for name in saved}
            assert len(saved) == len(parameters), "parameters of one group have trained since the same step"
            assert len(steps) == 1, f"steps of one group differ: {steps}"
            state = self._base.state[flat] = {key: torch.zeros_like(flat) for key in _MOMENTS}
            state["step"] = torch.tensor(steps.pop(), dtype=torch.float32)
            for parameter in parameters:
                for key in _MOMENTS:
                    self._cut(parameter, state[key], key, moments[f"{names[id(parameter)]}/{key}"])

    def _cut(self, parameter: nn.Parameter, moment: Tensor, key: str, whole: Tensor) -> None:
        whole_M = whole.flatten().to(moment.device)
        if self.divides_weights:
            from deepspeed.utils import safe_set_local_optimizer_state

            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(whole_M, (0, size * self.runtime.world - whole_M.numel()))
            part = padded.narrow(0, size * self.runtime.rank, size)
            safe_set_local_optimizer_state(parameter, part.to(self.runtime.device), key)
        elif (places := _places(parameter)) is not None:
            inside, flat = places
            moment[flat] = whole_M[inside]


class _Autocast(nn.Module):
    """A network whose forward computes in the precision of the configuration."""

    def __init__(self, runtime: Runtime, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._runtime = runtime

    def forward(self, **arguments: Any) -> Any:
        with self._runtime.autocast():
            return self.network(**arguments)


def _places(parameter: nn.Parameter) -> tuple[slice, slice] | None:
    """What this rank holds of a parameter under stages 1 and 2: (part of it, place in the flat tensor), or None."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return slice(inside.start, inside.start + inside.numel), slice(flat.start, flat.start + flat.numel)
