"""What a checkpoint says of itself, read without torch: where its run stands, which one is newest, which is best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from msmil.types import TrainState
from shards.errors import UserError
from shards.files import sha256_file

FORMAT_VERSION: Final = 1
STATE_NAME: Final = "state.json"
PREFIX: Final = "step_"
COPY_AGAIN: Final = "copy the folder again from where it is whole"


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any] | None]:
    """Where a run stood at a checkpoint, and the state of fp16's loss scaling (None in other precisions).

    Raises:
        UserError: state.json is missing, no JSON, of another format version, or has other fields.
    """
    try:
        content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            fix = f"use the msmil release that wrote it; this one reads version {FORMAT_VERSION}"
            raise UserError(f"checkpoint format version {version!r}", file=folder, fix=fix)
        return _typed(TrainState(**content["train_state"])), content["loss_scale"]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(folder, error) from None


def unreadable(folder: Path, error: Exception) -> UserError:
    """The word for a checkpoint with a broken file."""
    fix = "remove this folder; the checkpoint before it is used then"
    return UserError(f"the checkpoint cannot be read ({error})", file=folder, fix=fix)


def cut_off(folder: Path) -> str:
    """What is missing of a checkpoint, in words, or "" where it is whole; looks at sizes alone.

    A checkpoint appears under its name only when it is whole; later a copy may be cut off, or a disk that lost power.
    Those of the first release tell no sizes.
    """
    try:
        content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_NAME} is missing"
    except ValueError:
        return f"{STATE_NAME} is cut off"
    except OSError:
        return ""  # who reads it says why
    files = content.get("files") if isinstance(content, dict) else None
    for name, told in files.items() if isinstance(files, dict) else ():
        if not (folder / name).exists():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != told["bytes"]:
            return f"{name} has {size} of {told['bytes']} bytes"
    return ""


def changed(folder: Path, *names: str) -> str:
    """What has other content than was saved, in words, or "": of all files of a checkpoint, or of these alone.

    Those of the first release tell no digests.
    """
    try:
        content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        files = content.get("files") if isinstance(content, dict) else None
        for name, told in files.items() if isinstance(files, dict) else ():
            if (name in names or not names) and sha256_file(folder / name).hex() != told["sha256"]:
                return f"{name} has other content than was saved"
    except OSError:
        return ""  # who reads it says why
    return ""


def pointed(root: Path, pointer: str) -> Path | None:
    """The folder that a pointer (`latest`, `best`) names, or None when there is no such pointer or folder."""
    file = root / pointer
    if not file.is_file():
        return None
    folder = root / file.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def checkpoints(root: Path) -> list[Path]:
    """The folders of all checkpoints, in the order of their steps."""
    return sorted(root.glob(f"{PREFIX}*"))


def newest(root: Path) -> Path | None:
    """The folder of the highest step that is whole."""
    return next((folder for folder in reversed(checkpoints(root)) if not cut_off(folder)), None)


def none_is_whole(root: Path, reason: str) -> UserError:
    """The word where there are checkpoints, and not one to go on from: to begin again would not be what was asked."""
    fix = f"{COPY_AGAIN}; to train from the beginning remove it, or choose another name"
    return UserError(f"no checkpoint is whole ({reason})", file=root, fix=fix)


def metric_of(state: TrainState) -> float | None:
    """The validation metric of a checkpoint's own step, None where it was not validated."""
    if state.metric is None and state.best_step == state.step:  # the first release told no other
        return state.best_metric
    return state.metric


def _typed(state: TrainState) -> TrainState:
    for name in ("step", "epoch", "batches_done", "samples_seen", "skipped"):
        if not isinstance(getattr(state, name), int):
            raise TypeError(f"{name} is {getattr(state, name)!r}")
    return state
