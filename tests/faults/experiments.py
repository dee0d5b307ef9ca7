"""The small experiment with all on that a restart could get wrong: dropout, augmentation, averages, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.experiments import write_tiny

ON: dict[str, dict[str, Any]] = {
    "bags": {"augment": {"rotation_deg": 5, "gain": 0.2, "noise_sd": 0.02}},
    "model": {"encoder_dropout": 0.3, "attention_dropout": 0.2},
    "train": {"epochs": 3, "batch_size": 12, "accumulation": 2, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 2},
}


def write_full(folder: Path, packed: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Write it under a name, with some keys of its sections changed."""
    merged = {key: ON.get(key, {}) | sections.get(key, {}) for key in ON.keys() | sections.keys()}
    return write_tiny(folder, packed, name=name, **merged)
