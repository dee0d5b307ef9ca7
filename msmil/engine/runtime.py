"""The one place that configures accelerate and DeepSpeed: processes, device, precision, what ranks tell each other."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from msmil.config import TrainConfig
from msmil.engine.bf16 import compute_bf16, cpu_has_bf16
from msmil.engine.environment import refuse_environment, require_engine, task_variables
from msmil.engine.watchdog import END_GRACE_S, Watchdog, connect_to_launcher, end
from shards.errors import UserError
from shards.host_memory import keep_freed_memory

_MEETING_PLACE: Final = ("MASTER_ADDR", "MASTER_PORT")


class Runtime:
    """This process among the others.

    Attributes:
        rank, world: which process this is, of how many.
        node_ranks: the ranks of this machine.
        device: where tensors go.
        is_main: rank 0, which alone writes files and logs.
        quiet: no progress and no information on the terminal; files are the same.
        accelerator: accelerate's, for the engines.
    """

    def __init__(self, config: TrainConfig, *, quiet: bool = False) -> None:
        refuse_environment(config)
        os.environ.update(task_variables())
        # accelerate lets this variable win over its argument; accumulation is ours alone
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        use_gpu = gpu_in_use()
        if not use_gpu:
            refuse_on_cpu(config)
            keep_freed_memory()
            if config.precision == "bf16":
                compute_bf16()
        make = _with_deepspeed if config.engine == "deepspeed" else _with_ddp
        self.accelerator: Accelerator = meet(lambda: make(config, use_gpu))
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.quiet = quiet
        self._watchdog: Watchdog | None = None
        if self.world > 1:
            self._watchdog = Watchdog(self.rank, self.world, connect_to_launcher, timeout_s=config.timeout_s)
        hosts = self.gather(socket.gethostname())
        self.node_ranks = tuple(rank for rank, host in enumerate(hosts) if host == hosts[self.rank])
        if config.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # torch's default rounds what convolutions read to ten bits
        self._autocast_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

    @property
    def device_name(self) -> str:
        """What computes, in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap model and optimizer for this world, all ranks together; only parameters that train now take part."""
        with warnings.catch_warnings(), self.waiting():
            # torch >= 2.14 has another word for it, which older ones and accelerate do not know
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return cast("tuple[Any, Any]", self.accelerator.prepare(model, optimizer))

    def release(self, prepared: nn.Module) -> None:
        """Unwrap a module, so that it can be prepared anew (when what trains changes)."""
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def accumulate(self, prepared: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients only in the last micro-step."""
        return nullcontext() if last else cast("AbstractContextManager[Any]", self.accelerator.no_sync(prepared))

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward precision, for calls of a module that is not prepared."""
        dtype = self._autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def waiting(self) -> AbstractContextManager[None]:
        """What happens in here waits for the other ranks: longer than train.timeout_s, and this process ends.

        The rank that does not answer is named first (msmil.engine.watchdog).
        """
        return nullcontext() if self._watchdog is None else self._watchdog.waiting()

    def tell_hangs_to(self, log_file: Path) -> None:
        """Where the word about a rank that does not answer is added."""
        if self._watchdog is not None:
            self._watchdog.log_file = log_file

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        if self.world > 1:
            with self.waiting():
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
        with self.waiting():
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
        with self.waiting():
            self.accelerator.wait_for_everyone()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock reads what was done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the process group; behind an error other ranks may be gone, and only the watchdog is ended.

        A thread that asks the store while Python ends would abort the process: another exit code.
        """
        if self._watchdog is not None:
            self._watchdog.close()
        if kind is None:
            self.accelerator.end_training()


def meet(make: Callable[[], Accelerator]) -> Accelerator:
    """What makes this process one of a world. Where the others do not come this process says so, and ends."""
    start_s = time.monotonic()
    try:
        return make()
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        rank, world, host, port = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", *_MEETING_PLACE))
        end(
            f"rank {rank} ({socket.gethostname()}): the {world} processes did not meet at {host}, port {port}, within "
            f"{time.monotonic() - start_s:.0f} s ({str(error).splitlines()[0]}). See that all of them were started, "
            "that each reaches that machine, and that nothing else listens there",
            None,
        )


def _with_ddp(config: TrainConfig, use_gpu: bool) -> Accelerator:
    return Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=not use_gpu,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_backend_timeout(config)),
        ],
    )


def _with_deepspeed(config: TrainConfig, use_gpu: bool) -> Accelerator:
    """Precision is in DeepSpeed's own configuration; clipping is added when an optimizer is prepared."""
    require_engine(config)
    # DeepSpeed calls collectives by names that torch is about to change
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    backend = "nccl"
    if not use_gpu:
        if torch.cuda.is_available():
            fix = "unset ACCELERATE_USE_CPU, or set train.engine: ddp"
            raise UserError("DeepSpeed cannot be kept off this machine's GPUs", fix=fix)
        # accelerate drops DeepSpeed without a word when it is told to use the CPU; without gloo every process
        # believes that it is alone
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["DS_ACCELERATOR"] = "cpu"
        _build_no_operators()
        backend = "gloo"
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)  # a single process that no launcher started
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # what an accelerate file says agrees, or was refused
    parts = int(os.environ["WORLD_SIZE"]) * config.accumulation
    return Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=config.accumulation,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, micro_batch=config.batch_size // parts)),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=_backend_timeout(config))],
    )


def _backend_timeout(config: TrainConfig) -> timedelta:
    """Gloo's and NCCL's own: later than ours, which names the rank."""
    return timedelta(seconds=config.timeout_s + END_GRACE_S)


def deepspeed_config(config: TrainConfig, *, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it but clipping: none is read from a file.

    Weights stay fp32. bf16 is torch's autocast: DeepSpeed's own bf16 mode casts parameters and leaves batch-norm
    buffers behind. What ranks send is fp32 too, as under DDP: rounded for the way, gathered weights (stage 3) would be
    others than a whole copy has wherever they are used in fp32.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, micro_batch),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere: the same numbers with and without offload
        "steps_per_print": 10**9,
    }
    if config.precision == "bf16":
        options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return options


def _build_no_operators() -> None:
    """DeepSpeed would compile an all-reduce of its inference for minutes at every first start.

    Training never calls it, and a rank that is killed while it loads leaves a lock behind, on which every later start
    would wait for ever (torch.utils.file_baton).
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # releases up to 0.19.0 look it up without `get`


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def gpu_in_use() -> bool:
    """Whether ranks of this machine run on GPUs; ACCELERATE_USE_CPU keeps them off."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")


def emulated_precision(config: TrainConfig, device: torch.device) -> str | None:
    """What to tell of a precision that this machine computes by other means; None where it has instructions for it."""
    if config.precision != "bf16" or device.type != "cpu" or cpu_has_bf16():
        return None
    return (
        "train.precision is bf16, and this CPU has no instructions for it: factors and results are rounded to bf16, "
        "products and sums are fp32; the numbers are those of bf16, the speed is that of train.precision=fp32"
    )


def refuse_on_cpu(config: TrainConfig) -> None:
    """Refuse what needs a GPU."""
    if config.precision == "fp16":
        raise UserError("train.precision is fp16, but there is no GPU", fix="set train.precision: fp32 or bf16")
    if config.batch_norm == "sync":
        raise UserError("train.batch_norm is sync, but there is no GPU", fix="set train.batch_norm: train or frozen")
