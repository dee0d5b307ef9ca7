"""One checkpoint format, independent of engine and ranks.

checkpoints/step_N/{model.safetensors, optimizer.safetensors, ema.safetensors, config.yaml, state.json}, written under
a temporary name and renamed when whole; `latest` and `best` are pointers (text files that name a folder). state.json
is written last and tells size and digest of the others, so that a copy that was cut off is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msmil.engine.checkpoint_state import (
    COPY_AGAIN,
    FORMAT_VERSION,
    PREFIX,
    STATE_NAME,
    changed,
    checkpoints,
    cut_off,
    metric_of,
    newest,
    none_is_whole,
    pointed,
    read_state,
    unreadable,
)
from msmil.types import TrainState
from shards.errors import UserError
from shards.files import (
    atomic_file,
    atomic_folder,
    human_bytes,
    put_back_folders,
    remove_folder,
    remove_leftovers,
    sha256_file,
)

_FREE_SPACE_FACTOR: Final = 1.1
_AGAIN: Final = "free space or choose another output_dir, then start the same command again: it resumes"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint is written from: tensors that nobody else changes, in host memory."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: TrainState
    loss_scale: dict[str, Any] | None
    config_yaml: str

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by the name of their file."""
        return {"model": self.model, "optimizer": self.optimizer} | ({} if self.ema is None else {"ema": self.ema})


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Snapshot):
    """What a folder step_N holds, on the CPU."""

    folder: Path


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in host memory, whole when this returns."""
    contiguous = torch.contiguous_format
    return {key: x.detach().to("cpu", copy=True, memory_format=contiguous) for key, x in tensors.items()}


def save_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write step_N atomically and point `latest` at it, and `best` at the best step so far.

    Raises:
        UserError: the disk is full or not writable; what was there stays whole.
    """
    target = root / f"{PREFIX}{snapshot.state.step:08d}"
    tensors = [x for part in snapshot.parts.values() for x in part.values()]
    needed_bytes = int(sum(x.numel() * x.element_size() for x in tensors) * _FREE_SPACE_FACTOR)
    try:
        if root.exists():
            remove_leftovers(root)
        with atomic_folder(target, needed_bytes=needed_bytes) as folder:
            _write(folder, snapshot)
        point(root, "latest", target.name)
        _point_at_best(root, snapshot.state)
    except UserError as error:
        raise UserError(f"the checkpoint could not be saved: {error.thing}", file=target, fix=_AGAIN) from None
    except (OSError, SafetensorError) as error:
        needed = f"about {human_bytes(needed_bytes)} are needed"
        raise UserError(f"the checkpoint could not be saved ({error}; {needed})", file=target, fix=_AGAIN) from None
    return target


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name, part in snapshot.parts.items():
        save_file(part, _file(folder, name))
    (folder / "config.yaml").write_text(snapshot.config_yaml, encoding="utf-8")
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file).hex()}
        for file in sorted(folder.iterdir())
    }
    content = {
        "format_version": FORMAT_VERSION,
        "train_state": asdict(snapshot.state),
        "loss_scale": snapshot.loss_scale,
        "files": files,
    }
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _point_at_best(root: Path, state: TrainState) -> None:
    """`best` names the best step of the run as it now is: after going on from an older checkpoint, that one's."""
    best = None if state.best_step is None else root / f"{PREFIX}{state.best_step:08d}"
    if best is not None and best != pointed(root, "best") and best.is_dir():
        point(root, "best", best.name)


def point(root: Path, pointer: str, name: str) -> None:
    """Let the pointer (`latest`, `best`) name a checkpoint folder, atomically."""
    with atomic_file(root / pointer) as file:
        file.write(f"{name}\n".encode())


class DamagedError(UserError):
    """A checkpoint of which something is missing or changed: the one before it can be used."""


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; safetensors and JSON only, so nothing in it is executed.

    Raises:
        DamagedError: a file is missing, cut off or changed.
        UserError: it cannot be read, or is of another format version.
    """
    if reason := cut_off(folder):
        raise DamagedError(f"the checkpoint is cut off ({reason})", file=folder, fix=COPY_AGAIN)
    try:
        state, loss_scale = read_state(folder)
        if reason := changed(folder):
            raise DamagedError(f"the checkpoint is damaged ({reason})", file=folder, fix=COPY_AGAIN)
        ema_file = _file(folder, "ema")
        return Checkpoint(
            folder=folder,
            model=load_file(_file(folder, "model")),
            optimizer=load_file(_file(folder, "optimizer")),
            ema=load_file(ema_file) if ema_file.exists() else None,
            state=state,
            loss_scale=loss_scale,
            config_yaml=(folder / "config.yaml").read_text(encoding="utf-8"),
        )
    except UserError:
        raise
    except (FileNotFoundError, SafetensorError) as error:  # of the first release, which told no sizes
        raise DamagedError(f"the checkpoint cannot be read ({error})", file=folder, fix=COPY_AGAIN) from None
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from None


def load_newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, None where there is none at all; `say` gets a line on each one before it.

    No other process may be saving.

    Raises:
        UserError: none is whole; one cannot be read, or is of another format version.
    """
    put_back_folders(root)
    last: UserError | None = None
    for folder in reversed(checkpoints(root)):
        try:
            return load_checkpoint(folder)
        except DamagedError as damaged:
            say(f"{damaged.file}: {damaged.thing}: it is left out")
            last = damaged
    if last is not None:
        raise none_is_whole(root, last.thing)
    return None


def prune(root: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove old checkpoints.

    Kept are the newest `keep_last`, the `keep_best` with the best validation metric, and those that `best` and
    `latest` name. Those that are cut off are removed once a newer one is whole.
    """
    at = newest(root)
    older = [folder for folder in checkpoints(root) if at is not None and folder <= at]
    whole = [folder for folder in older if not cut_off(folder)]
    metrics = {folder: _metric(folder) for folder in whole}
    # of equal ones the first is the best
    ranked = sorted((-metric, folder) for folder, metric in metrics.items() if metric is not None)
    kept = {pointed(root, "best"), pointed(root, "latest"), *whole[-keep_last:]}
    kept |= {folder for _, folder in ranked[:keep_best]}
    for folder in older:
        if folder not in kept:
            remove_folder(folder)


def _metric(folder: Path) -> float | None:
    try:
        return metric_of(read_state(folder)[0])
    except UserError:  # of another release: it is as old as its step says
        return None


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
