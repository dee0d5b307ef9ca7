"""What a checkpoint says of itself, read without torch: where its run stands, which one is newest, which is best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from msmil.types import TrainState
from shards.errors import UserError

FORMAT_VERSION: Final = 1
STATE_NAME: Final = "state.json"
PREFIX: Final = "step_"


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


def pointed(root: Path, pointer: str) -> Path | None:
    """The folder that a pointer (`latest`, `best`) names, or None when there is no such pointer or folder."""
    file = root / pointer
    if not file.is_file():
        return None
    folder = root / file.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def newest(root: Path) -> Path | None:
    """The folder of the highest step; only whole checkpoints carry a final name."""
    return max(root.glob(f"{PREFIX}*"), default=None)


def _typed(state: TrainState) -> TrainState:
    for name in ("step", "epoch", "batches_done", "samples_seen", "skipped"):
        if not isinstance(getattr(state, name), int):
            raise TypeError(f"{name} is {getattr(state, name)!r}")
    return state
