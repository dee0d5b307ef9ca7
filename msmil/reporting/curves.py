"""The scalars of a run, from TensorBoard's event files: no torch, no TensorFlow. T points of a tag."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msmil.reporting.figures import Series

Array = NDArray[Any]

_ONE_OF_OTHERS: Final = 1  # pictures and texts are not read, beyond one


@dataclass(frozen=True)
class Curves:
    """Scalars by tag: steps and values, ascending in step."""

    scalars: Mapping[str, tuple[Array, Array]]

    def series(self, prefix: str) -> list[Series]:
        """All lines whose tag starts with `prefix`, named by the rest of it."""
        return [Series(tag.removeprefix(prefix), *self.scalars[tag]) for tag in self.scalars if tag.startswith(prefix)]

    def one(self, tag: str) -> tuple[Array, Array] | None:
        """Steps and values of a tag, None where there is none."""
        return self.scalars.get(tag)


def read_curves(folder: Path) -> Curves:
    """All scalars of an event folder; an event that was cut off, and all behind it in its file, are left out."""
    if not folder.is_dir() or not any(folder.glob("*tfevents*")):
        return Curves({})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("images", "audio", "histograms", "tensors", "compressedHistograms"), _ONE_OF_OTHERS)
    log = logging.getLogger("tensorboard")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every file that ends early
    try:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0} | sizes)
        events.Reload()
        found = {tag: _points(events.Scalars(tag)) for tag in sorted(events.Tags()["scalars"])}
    finally:
        log.setLevel(level)
    return Curves(found)


def _points(events: Any) -> tuple[Array, Array]:
    """In the order of the steps; of several values at one step the last written counts."""
    by_step = {event.step: event.value for event in events}
    steps = sorted(by_step)
    return np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64)
