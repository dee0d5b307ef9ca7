"""The one place that configures accelerate: processes, device, precision, and what ranks say to each other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from msmil.config import TrainConfig
from msmil.engine.environment import refuse_environment
from shards.errors import UserError


class Runtime:
    """This process among the others.

    Attributes:
        rank, world: which process this is, of how many.
        device: where tensors go.
        is_main: rank 0, which alone writes files and logs.
        quiet: no progress and no information on the terminal; files are the same.
    """

    def __init__(self, config: TrainConfig, *, quiet: bool = False) -> None:
        refuse_environment(config)
        # accelerate lets this variable win over its argument; accumulation is ours alone
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        use_gpu = gpu_in_use()
        if not use_gpu:
            refuse_on_cpu(config)
        self._accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=not use_gpu,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.quiet = quiet

    @property
    def device_name(self) -> str:
        """What computes, in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wrap model and optimizer for this world; only parameters that train now take part."""
        with warnings.catch_warnings():
            # torch >= 2.14 has another word for it, which older ones and accelerate do not know
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return cast("tuple[nn.Module, Any]", self._accelerator.prepare(model, optimizer))

    def release(self, prepared: nn.Module) -> nn.Module:
        """The bare module of a prepared one, ready to be prepared anew (when what trains changes)."""
        module = cast(nn.Module, self._accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
        self._accelerator.free_memory()
        return module

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss that is this rank's share of the global sum.

        DDP averages gradients over ranks; the loss is a sum over ranks divided by a constant, hence the factor.
        """
        self._accelerator.backward(loss * self.world)

    def accumulate(self, prepared: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients only in the last micro-step."""
        return nullcontext() if last else cast("AbstractContextManager[Any]", self._accelerator.no_sync(prepared))

    def clip_gradients(self, prepared: nn.Module, largest: float) -> Tensor:
        """Clip to the largest norm (0: no clipping) and return the norm before it."""
        parameters = [p for p in prepared.parameters() if p.requires_grad]
        norm = self._accelerator.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))
        return cast(Tensor, norm)

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward precision, for calls of a module that is not prepared."""
        return cast("AbstractContextManager[Any]", self._accelerator.autocast())

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of fp16's loss scaling, None in other precisions."""
        scaler = self._accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_loss_scale(self, state: Mapping[str, Any] | None) -> None:
        """Go on with a saved loss scale."""
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(dict(state))

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over ranks, in one flat all-reduce."""
        if self.world == 1:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors])) / self.world
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank, in rank order, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], None]) -> None:
        """Do something on rank 0 while the others wait; its UserError (or OSError) is raised on all ranks."""
        error: UserError | None = None
        if self.is_main:
            try:
                action()
            except UserError as raised:
                error = raised
            except OSError as raised:
                fix = "free space and see that the folder can be written, then start the same command again"
                error = UserError(f"a file could not be written ({raised.strerror})", file=raised.filename, fix=fix)
        first = self.gather(error)[0]
        if first is not None:
            raise first

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock reads what was done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()


def gpu_in_use() -> bool:
    """Whether ranks of this machine run on GPUs; ACCELERATE_USE_CPU keeps them off."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")


def refuse_on_cpu(config: TrainConfig) -> None:
    """Refuse what needs a GPU."""
    if config.precision == "fp16":
        raise UserError("train.precision is fp16, but there is no GPU", fix="set train.precision: fp32 or bf16")
    if config.batch_norm == "sync":
        raise UserError("train.batch_norm is sync, but there is no GPU", fix="set train.batch_norm: train or frozen")
