"""Random changes of training images: drawn on the CPU per sample, applied to the whole batch on its device.

B images, H W pixels, R squares. A draw is a function of (seed, epoch, sample) alone, so that an image is changed
the same way on any rank, at any place of a batch, and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from msmil.config import AugmentConfig

# Tells these random numbers from others that are drawn from the same seed and epoch.
_STREAM = 2
# Draws of a sample in this order, used or not: switching an option on leaves the others as they are.
_NAMES = ("flip_h", "flip_v", "angle", "scale", "gamma", "gain", "offset", "noise_sd", "noise_seed")
# The darkest tissue: the smallest step of 16 bits, so that dark tissue does not turn into air.
_DARKEST = 1.0 / 65535.0


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What was drawn for a batch; float32 on the CPU unless it says otherwise.

    flip_h_B, flip_v_B: bool; angle_B: radians, counter-clockwise; scale_B: size of the new image of a thing over its
    old one; gamma_B, gain_B, offset_B, noise_sd_B: intensities in 0..1; noise_seed_B: int64; cutout_BR2: centres
    (x, y) as shares of width and height. `config` says which of them are in use.
    """

    config: AugmentConfig
    flip_h_B: Tensor
    flip_v_B: Tensor
    angle_B: Tensor
    scale_B: Tensor
    gamma_B: Tensor
    gain_B: Tensor
    offset_B: Tensor
    noise_sd_B: Tensor
    noise_seed_B: Tensor
    cutout_BR2: Tensor


def draw(config: AugmentConfig, *, seed: int, epoch: int, sample_B: Tensor) -> Augmentation:
    """What happens to each sample (manifest row, int64 on the CPU) in this epoch."""
    count = len(_NAMES) + 2 * config.cutout_count
    share_BD = torch.from_numpy(_uniform(seed, epoch, sample_B.tolist(), count))
    share = dict(zip(_NAMES, share_BD.unbind(1), strict=False))

    def around_zero(name: str, largest: float) -> Tensor:
        return (2 * share[name] - 1) * largest

    return Augmentation(
        config=config,
        flip_h_B=share["flip_h"] < config.horizontal_flip,
        flip_v_B=share["flip_v"] < config.vertical_flip,
        angle_B=around_zero("angle", math.radians(config.rotation_deg)).float(),
        scale_B=(1 + around_zero("scale", config.scale)).float(),
        gamma_B=around_zero("gamma", config.gamma).exp().float(),
        gain_B=(1 + around_zero("gain", config.gain)).float(),
        offset_B=around_zero("offset", config.offset).float(),
        noise_sd_B=(share["noise_sd"] * config.noise_sd).float(),
        noise_seed_B=(share["noise_seed"] * 2**53).to(torch.int64),
        cutout_BR2=share_BD[:, len(_NAMES) :].reshape(len(share_BD), config.cutout_count, 2).float(),
    )


def _uniform(seed: int, epoch: int, samples: list[int], count: int) -> NDArray[np.float64]:
    """Shares in 0 <= u < 1, [samples, count], from raw words of a bit generator, whose stream numpy promises."""
    words = np.empty((len(samples), count), np.uint64)
    for row, sample in enumerate(samples):
        sequence = np.random.SeedSequence((seed, epoch, sample), spawn_key=(_STREAM,))
        words[row] = np.random.Philox(sequence).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def apply(x_B1HW: Tensor, drawn: Augmentation) -> Tensor:
    """Change float32 images in 0..1: flips, rotation and scale, then intensities, then squares of black.

    The result stays in 0..1; air (0) stays 0, and tissue stays above 0.
    """
    x_B1HW = _geometric(x_B1HW, drawn)
    x_B1HW = _intensities(x_B1HW, drawn)
    return _cutout(x_B1HW, drawn) if drawn.config.cutout_count else x_B1HW


def _geometric(x_B1HW: Tensor, drawn: Augmentation) -> Tensor:
    config = drawn.config
    if config.rotation_deg > 0 or config.scale > 0:
        return F.grid_sample(x_B1HW, _grid(x_B1HW, drawn), "bilinear", "zeros", align_corners=False)
    for flip_B, dim in ((drawn.flip_h_B, 3), (drawn.flip_v_B, 2)):
        if bool(flip_B.any()):
            x_B1HW = torch.where(_per_image(flip_B, x_B1HW), x_B1HW.flip(dim), x_B1HW)
    return x_B1HW


def _grid(x_B1HW: Tensor, drawn: Augmentation) -> Tensor:
    """Where each new pixel comes from, [B, H, W, 2] in -1..1 of width and height (torch's convention).

    new = R S F old about the centre, with flip F, scale S, rotation R in pixels; so old = F S^-1 R^-1 new. By
    broadcasting and not by a matrix product, whose rounding may depend on the size of the batch.
    """
    height, width = x_B1HW.shape[2:]
    device = x_B1HW.device
    x_W = (torch.arange(width, device=device) + 0.5) - width / 2
    y_H1 = (torch.arange(height, device=device)[:, None] + 0.5) - height / 2
    angle_B = drawn.angle_B.double()
    cos_B11 = (angle_B.cos() / drawn.scale_B).float().to(device)[:, None, None]
    sin_B11 = (angle_B.sin() / drawn.scale_B).float().to(device)[:, None, None]
    sign_x_B11 = (1 - 2 * drawn.flip_h_B.float()).to(device)[:, None, None] * (2 / width)
    sign_y_B11 = (1 - 2 * drawn.flip_v_B.float()).to(device)[:, None, None] * (2 / height)
    # Rows go down, so counter-clockwise on the screen is [cos, sin; -sin, cos]; this is its inverse.
    old_x_BHW = (cos_B11 * x_W - sin_B11 * y_H1) * sign_x_B11
    old_y_BHW = (sin_B11 * x_W + cos_B11 * y_H1) * sign_y_B11
    return torch.stack([old_x_BHW, old_y_BHW], dim=3)


def _intensities(x_B1HW: Tensor, drawn: Augmentation) -> Tensor:
    config = drawn.config
    if not (config.gamma or config.gain or config.offset or config.noise_sd):
        return x_B1HW
    tissue_B1HW = x_B1HW > 0
    if config.gamma:
        x_B1HW = x_B1HW ** _per_image(drawn.gamma_B, x_B1HW)
    if config.gain:
        x_B1HW = x_B1HW * _per_image(drawn.gain_B, x_B1HW)
    if config.offset:
        x_B1HW = x_B1HW + _per_image(drawn.offset_B, x_B1HW)
    if config.noise_sd:
        x_B1HW = x_B1HW + _noise(x_B1HW, drawn.noise_seed_B) * _per_image(drawn.noise_sd_B, x_B1HW)
    return torch.where(tissue_B1HW, x_B1HW.clamp(_DARKEST, 1.0), 0.0)


def _noise(x_B1HW: Tensor, noise_seed_B: Tensor) -> Tensor:
    """Standard normal noise; each image from a generator of its own, whatever else is in the batch."""
    noise_B1HW = torch.empty_like(x_B1HW)
    generator = torch.Generator(x_B1HW.device)
    for noise_1HW, seed in zip(noise_B1HW, noise_seed_B.tolist(), strict=True):
        noise_1HW.normal_(generator=generator.manual_seed(seed))
    return noise_B1HW


def _cutout(x_B1HW: Tensor, drawn: Augmentation) -> Tensor:
    side = drawn.config.cutout_px

    def covered(axis: int, length: int) -> Tensor:
        first_BR1 = (drawn.cutout_BR2[:, :, axis, None] * length).floor() - side // 2
        place_L = torch.arange(length)
        return ((place_L >= first_BR1) & (place_L < first_BR1 + side)).float().to(x_B1HW.device)

    x_BRW, y_BRH = covered(0, x_B1HW.shape[3]), covered(1, x_B1HW.shape[2])
    squares_BHW = torch.einsum("brh,brw->bhw", y_BRH, x_BRW)
    return torch.where(squares_BHW[:, None] > 0, 0.0, x_B1HW)


def _per_image(value_B: Tensor, x_B1HW: Tensor) -> Tensor:
    return value_B.to(x_B1HW.device, non_blocking=True)[:, None, None, None]
