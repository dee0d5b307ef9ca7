"""The largest batch that fits."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from msmil.engine.bench.clock import peak_of
from msmil.engine.memory import OutOfMemory, available_bytes, resident_bytes

_MOST = 4096
_ROOM = 0.9


@dataclass(frozen=True)
class Largest:
    """What was found, for one rank and micro-step.

    images: of the batch.
    tried: it was stepped, and one larger by `grain` did not fit (grain 0: more were not tried). Else it is what the
        available memory gives when it is divided by the memory per image.
    per_image_bytes: that memory, where it was measured.
    failed: what the last size that did not fit died of, where it was not memory (libraries count in 32 bits).
    """

    images: int
    tried: bool
    grain: int = 0
    per_image_bytes: int | None = None
    failed: str | None = None


def largest_batch(
    step: Callable[[int], None],
    device: torch.device,
    *,
    tell: Callable[[str], None] = lambda _: None,
    most: int = _MOST,
) -> Largest:
    """The most images that `step` can take at a time; `tell` hears of each size that was tried.

    On a GPU by doubling until memory runs out, then halving the gap to a sixteenth of the answer. On a CPU, where
    running out ends the process, from the measured peaks of 1 and 3 images and the memory that is available.
    """
    return _by_trying(step, tell, most) if device.type == "cuda" else _by_measuring(step, device, most)


def _by_trying(step: Callable[[int], None], tell: Callable[[str], None], most: int) -> Largest:
    fits, fails = 0, most + 1
    failed: str | None = None
    tries = 1
    while fails - fits > max(1, fits // 16):
        start_s = time.perf_counter()
        try:
            step(tries)
        except OutOfMemory:
            fails, failed = tries, None
        except RuntimeError as error:
            fails, failed = tries, str(error).splitlines()[0]
        else:
            fits = tries
        tell(f"{tries} images {'fit' if fits == tries else 'do not fit'} ({time.perf_counter() - start_s:.1f} s)")
        _free()  # behind the handlers, which held the frames of the step and all that they hold
        tries = min(2 * fits, most) if fails > most else (fits + fails) // 2
        if tries <= fits:
            break
    return Largest(fits, tried=True, grain=0 if fails > most else fails - fits, failed=failed)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _by_measuring(step: Callable[[int], None], device: torch.device, most: int) -> Largest:
    few, more = 1, 3
    step(more)  # what a first step takes besides is there afterwards
    base = resident_bytes()
    peaks = {images: peak_of(lambda: step(images), device) for images in (few, more)}  # noqa: B023 - called at once
    per_image = max(1, (peaks[more] - peaks[few]) // (more - few))
    left = available_bytes() * _ROOM - max(0, peaks[few] - base)
    return Largest(max(1, min(most, few + int(left / per_image))), tried=False, per_image_bytes=per_image)
