"""Memory: how much there is, how much was used, and the word for a user when it runs out."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import nn

from msmil.config import Config
from msmil.engine.doctor.machine import control_groups
from shards.errors import UserError
from shards.files import human_bytes
from shards.host_memory import trim

_REQUEST: Final = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)?")
_UNITS: Final = {None: 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ON_A_CPU: Final = "DefaultCPUAllocator"
_MOMENTS: Final = 2  # of AdamW
_ROOM: Final = 0.9  # of the memory; the rest is for gaps between tensors and for what libraries take


class OutOfMemory(UserError):  # noqa: N818 - the name that everybody knows
    """Memory ran out; names the batch, the memory and settings that would fit."""


@contextmanager
def explained(explain: Callable[[Exception], OutOfMemory]) -> Iterator[None]:
    """Where memory runs out inside, raise what `explain` makes of the error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise explain(error) from None
    except RuntimeError as error:
        if _ON_A_CPU not in str(error):
            raise
        raise explain(error) from None


def training_out_of_memory(
    error: Exception, config: Config, module: nn.Module, *, images: int, world: int, device: torch.device
) -> OutOfMemory:
    """The word for a training step.

    Args:
        error: what torch raised.
        config: the run's.
        module: what trains.
        images: of the micro-batch.
        world: number of ranks.
        device: where it computes.
    """
    train = config.train
    need = peak_bytes(device) + requested_bytes(error)
    fixed = fixed_bytes(module)
    per_image = max(1, need - fixed) / images
    fit = min(images - 1, int((_ROOM * total_bytes(device) - fixed) / per_image))
    of = f"train.batch_size {train.batch_size} / {world} ranks / train.accumulation {train.accumulation}"
    thing = (
        f"out of memory with {images} images at a time ({of}) on {memory_text(device)}; weights, gradients and moments "
        f"take {human_bytes(fixed)}, an image at least {human_bytes(int(per_image))}"
    )
    return OutOfMemory(thing, fix=_settings(config, images, world, fit))


def evaluation_out_of_memory(config: Config, *, device: torch.device) -> OutOfMemory:
    """The word for a forward pass of an evaluation."""
    images = config.evaluate.batch_size
    smaller = f"set evaluate.batch_size: {max(1, images // 2)}" if images > 1 else "use a GPU with more memory"
    return OutOfMemory(
        f"out of memory with {images} images at a time (evaluate.batch_size) on {memory_text(device)}",
        fix=smaller if config.train.precision != "fp32" else f"{smaller}, or train.precision: bf16",
    )


def _settings(config: Config, images: int, world: int, fit: int) -> str:
    """What to change, the least first."""
    train = config.train
    found = []
    per_rank = train.batch_size // world
    parts = [n for n in range(train.accumulation + 1, per_rank + 1) if per_rank % n == 0]
    if parts:
        chosen = next((n for n in parts if per_rank // n <= fit), parts[-1])
        of = f"of which at most {fit} fit" if fit >= 1 else "of which one may be too much"
        found.append(f"set train.accumulation: {chosen} ({per_rank // chosen} images at a time, {of})")
    if not train.gradient_checkpointing and train.batch_norm == "frozen":
        found.append("train.gradient_checkpointing: true")
    if train.precision == "fp32":
        found.append("train.precision: bf16")
    if train.encoder == "finetune" and train.trainable_blocks != 0:
        found.append("fewer train.trainable_blocks")
    if len(found) > 1:
        found[-1] = f"or {found[-1]}"
    return ", ".join(found) or "use a GPU with more memory, or pack smaller images"


def requested_bytes(error: Exception) -> int:
    """What was asked for when memory ran out, 0 where the error does not say."""
    found = _REQUEST.search(str(error))
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2]])


def fixed_bytes(module: nn.Module) -> int:
    """Weights, and gradients and moments of those that train."""
    parameters = list(module.parameters())
    return sum((1 + (1 + _MOMENTS) * p.requires_grad) * p.numel() * p.element_size() for p in parameters)


def memory_text(device: torch.device) -> str:
    """The device's memory and who has it."""
    if device.type != "cuda":
        return f"a CPU with {human_bytes(total_bytes(device))} of memory, {human_bytes(peak_bytes(device))} used here"
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    others = max(0, total - free - own)  # and the context of this process
    name, held = torch.cuda.get_device_name(device), human_bytes(own)
    return f"{name}: {human_bytes(total)} in all, {held} held here, {human_bytes(others)} beside it"


def total_bytes(device: torch.device) -> int:
    """All memory of a GPU, or what is available to this process on a CPU beside what it has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return available_bytes() + resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most that was in use: of a GPU since `reset_peak`, of this process on a CPU likewise where Linux can."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of VmHWM alone
    except OSError:
        return  # the peak is then that of the whole process, and never too small


def resident_bytes() -> int:
    """Memory of this process, without what is free and kept."""
    trim()
    return _status_bytes("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What programs may still take: of the machine, or of this process's control group where that is less."""
    machine = _kilobytes(meminfo, "MemAvailable")
    groups = []
    for folder in control_groups():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            groups.append(max(0, limit - used))
    return min([machine, *groups])


def _status_bytes(name: str) -> int:
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(file: Path, name: str) -> int:
    """A line such as `VmRSS: 1234 kB` in bytes, 0 where it is missing."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return 0 if found is None else int(found.split()[1]) * 1024


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
