"""One checkpoint format, independent of engine and ranks.

checkpoints/step_N/{model.safetensors, optimizer.safetensors, ema.safetensors, state.json, config.yaml}, written under
a temporary name and renamed when whole; `latest` and `best` are pointers (text files that name a folder).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msmil.engine.checkpoint_state import FORMAT_VERSION, PREFIX, STATE_NAME, pointed, read_state, unreadable
from msmil.types import TrainState
from shards.errors import UserError
from shards.files import atomic_file, remove_leftovers, sync

_FREE_SPACE_FACTOR = 1.1


@dataclass(frozen=True)
class Checkpoint:
    """What a folder step_N holds, on the CPU."""

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: TrainState
    loss_scale: dict[str, Any] | None
    config_yaml: str


def save_checkpoint(
    root: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    state: TrainState,
    loss_scale: Mapping[str, Any] | None,
    config_yaml: str,
) -> Path:
    """Write step_N atomically and point `latest` at it.

    Raises:
        UserError: the disk is full or not writable; what was there stays whole.
    """
    target = root / f"{PREFIX}{state.step:08d}"
    temporary = root / f".{target.name}.tmp"
    parts = {"model": model, "optimizer": optimizer} | ({} if ema is None else {"ema": ema})
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        _check_free_space(root, parts)
        temporary.mkdir()
        for name, tensors in parts.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, _file(temporary, name)
            )
        content = {"format_version": FORMAT_VERSION, "train_state": asdict(state), "loss_scale": loss_scale}
        (temporary / STATE_NAME).write_text(json.dumps(content, indent=2), encoding="utf-8")
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync(root)
        point(root, "latest", target.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fix = "free space or choose another output_dir, then start the same command again: it resumes"
        raise UserError(f"the checkpoint could not be saved ({error})", file=target, fix=fix) from None
    return target


def point(root: Path, pointer: str, name: str) -> None:
    """Let the pointer (`latest`, `best`) name a checkpoint folder, atomically."""
    with atomic_file(root / pointer) as file:
        file.write(f"{name}\n".encode())


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; safetensors and JSON only, so nothing in it is executed.

    Raises:
        UserError: a file is missing, truncated, or of another format version.
    """
    try:
        state, loss_scale = read_state(folder)
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
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(folder, error) from None


def prune(root: Path, keep_last: int) -> None:
    """Remove old checkpoints, but never the newest `keep_last`, nor those that `best` and `latest` name."""
    folders = sorted(root.glob(f"{PREFIX}*"))
    kept = {pointed(root, "best"), pointed(root, "latest"), *folders[-keep_last:]}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _remove_leftovers(root: Path) -> None:
    """A save that was cut off leaves its temporary folder or pointer behind."""
    for folder in root.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(folder)
    remove_leftovers(root)


def _check_free_space(root: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    needed = sum(value.numel() * value.element_size() for tensors in parts.values() for value in tensors.values())
    free = shutil.disk_usage(root).free
    if free < needed * _FREE_SPACE_FACTOR:
        fix = "free space or choose another output_dir, then start the same command again: it resumes"
        thing = f"a checkpoint needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise UserError(thing, file=root, fix=fix)
