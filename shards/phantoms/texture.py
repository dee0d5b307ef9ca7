"""Random fields with a power-law spectrum, the texture of mammograms. H W pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.fft import fftfreq, ifft2, next_fast_len

from shards.phantoms.canvas import Canvas, Float

BETA: Final = 3.0
COARSEST_MM: Final = 70.0
STRAND_PERIOD_MM: Final = 9.0


@lru_cache(maxsize=4)
def _spectra(height_px: int, width_px: int) -> tuple[Float, Float]:
    """Amplitudes of the power law and of the strands' band, each so that its field has a variance of one."""
    canvas = Canvas(height_px, width_px)
    fy = fftfreq(next_fast_len(height_px), d=1 / canvas.px_per_mm)
    fx = fftfreq(next_fast_len(width_px), d=1 / canvas.px_per_mm)
    frequency = np.hypot(fy[:, None], fx[None, :])
    power_law = np.maximum(frequency, 1 / COARSEST_MM) ** (-BETA / 2)
    power_law[0, 0] = 0
    octave = np.log2(np.maximum(frequency, 1e-6) * STRAND_PERIOD_MM)
    band = np.exp(-np.square(octave / 0.7))
    # ifft2 of unit complex noise times amplitude a has variance sum(a²) / size² in its real and in its imaginary part
    scaled = [a * (a.size / np.sqrt(np.sum(np.square(a)))) for a in (power_law, band)]
    return scaled[0].astype(np.float32), scaled[1].astype(np.float32)


def random_fields(rng: np.random.Generator, canvas: Canvas) -> tuple[Float, Float, Float, Float]:
    """Four fields [H, W] of mean 0 and variance 1, in millimetres alike at every image size.

    The first two are independent with a power spectrum f^-3 (Burgess, Med. Phys. 28, 2001: breast structure has an
    exponent near 3); the other two are limited to periods around 9 mm.
    """
    power_law, band = _spectra(canvas.height_px, canvas.width_px)
    noise: NDArray[np.complex64] = rng.standard_normal((*power_law.shape, 2), dtype=np.float32).view(np.complex64)[
        ..., 0
    ]
    crop = np.s_[: canvas.height_px, : canvas.width_px]
    first = ifft2(noise * power_law)[crop]
    second = ifft2(noise * band)[crop]
    return first.real, first.imag, second.real, second.imag
