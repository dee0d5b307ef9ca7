"""Intensities on the device: integers to 0..1, local contrast, mean and standard deviation.

B images, H W pixels. Air and padding are exactly 0 before `standardise`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_LARGEST = {torch.uint8: 255.0, torch.uint16: 65535.0}


def to_unit(image_B1HW: Tensor) -> Tensor:
    """Stored pixels, uint8 or uint16, as float32 in 0..1 of the type's range (black stays 0)."""
    assert image_B1HW.dtype in _LARGEST, f"images are uint8 or uint16, not {image_B1HW.dtype}"
    # The cast comes first: uint16 has hardly any arithmetic in torch.
    return image_B1HW.to(torch.float32).div_(_LARGEST[image_B1HW.dtype])


def local_contrast(x_B1HW: Tensor, *, gain: float, sigma_px: float) -> Tensor:
    """x + gain * (x - G(x)) on tissue, G a Gaussian of `sigma_px` pixels; air (0) stays 0.

    G averages over tissue alone, G(x) / G(tissue): air inside the window would make a bright rim along the skin
    that is stronger than any lesion, and the border of the image would count as air.
    """
    tissue_B1HW = x_B1HW > 0
    both_B2HW = torch.cat([x_B1HW, tissue_B1HW.to(x_B1HW.dtype)], dim=1)
    blurred_B2HW = gaussian_blur(both_B2HW, sigma_px)
    mean_B1HW = blurred_B2HW[:, :1] / blurred_B2HW[:, 1:].clamp_min(torch.finfo(x_B1HW.dtype).tiny)
    return torch.where(tissue_B1HW, x_B1HW + gain * (x_B1HW - mean_B1HW), 0.0)


def gaussian_blur(x_BCHW: Tensor, sigma_px: float) -> Tensor:
    """Separable Gaussian, cut at 3 sigma and summing to 1, with zeros outside the image.

    A sum of shifted images: fp32 whatever the settings for convolutions are (TF32 would cost the very contrast
    that is looked for), and on a CPU several times faster than a convolution with one channel.
    """
    radius = max(1, math.ceil(3 * sigma_px))
    weights = [math.exp(-0.5 * (i / sigma_px) ** 2) for i in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x_BCHW.shape[dim]
        padded = F.pad(x_BCHW, pad)
        x_BCHW = x_BCHW * (weights[0] / total)
        for i in range(1, radius + 1):
            for start in (radius - i, radius + i):
                x_BCHW.add_(padded.narrow(dim, start, size), alpha=weights[i] / total)
    return x_BCHW


def standardise(x_B1HW: Tensor, *, mean: float, std: float) -> Tensor:
    """(x - mean) / std; black becomes `standard_black(mean, std)`."""
    return (x_B1HW - mean) / std


def standard_black(mean: float, std: float) -> float:
    """The value of air and padding after `standardise`: (0 - mean) / std."""
    return (0.0 - mean) / std
