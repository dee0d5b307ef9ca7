"""Which pixels of a stored mammogram are breast. H W pixels, h w pixels of the reduced image, B images."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Array = NDArray[Any]

_SIDE_PX: Final = 384  # the breast is looked for in an image of at most this length
_SMOOTHING: Final = 1 / 250  # standard deviation of the smoothing, in lengths of the longer side
_OPENING: Final = 1 / 50  # radius of the opening, likewise: markers on the skin are smaller
_BINS: Final = 256


def breast_masks(image_B1HW: Tensor) -> Tensor:
    """`breast_mask` of every image of a batch (uint8 or uint16, as stored): bool [B, H, W] on the CPU."""
    return torch.from_numpy(np.stack([breast_mask(image_1HW[0]) for image_1HW in image_B1HW.cpu().numpy()]))


def breast_mask(image_HW: Array) -> Array:
    """The breast (with the pectoral muscle) in a stored mammogram, bool [H, W]; never empty.

    The image is reduced and smoothed; Otsu's threshold on the cube root of the intensity parts the breast from the air
    (the root keeps dark fat and skin on the breast's side); an opening cuts off labels and markers that touch; the
    largest component that is left is the breast, its holes filled. An image without contrast counts as a whole.
    """
    height, width = image_HW.shape
    factor = -(-max(height, width) // _SIDE_PX)
    padded_HW = np.pad(image_HW.astype(np.float32), ((0, -height % factor), (0, -width % factor)), mode="edge")
    h, w = padded_HW.shape[0] // factor, padded_HW.shape[1] // factor
    small_hw = padded_HW.reshape(h, factor, w, factor).mean(axis=(1, 3))
    small_hw = ndimage.gaussian_filter(small_hw, max(h, w) * _SMOOTHING)
    dark, bright = float(small_hw.min()), float(np.quantile(small_hw, 0.99))
    if bright <= dark:
        return np.ones((height, width), np.bool_)
    root_hw = np.cbrt(np.clip((small_hw - dark) / (bright - dark), 0, 1))
    found_hw = ndimage.binary_fill_holes(root_hw >= _otsu(root_hw))
    opened_hw = _opened(found_hw, max(h, w) * _OPENING)
    breast_hw = ndimage.binary_fill_holes(_largest(opened_hw if opened_hw.any() else found_hw))
    return np.asarray(breast_hw.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width])


def _otsu(value_hw: Array) -> float:
    """The edge between bins over 0..1 that maximises the variance between the classes (Otsu 1979)."""
    count_c, edge = np.histogram(value_hw, bins=_BINS, range=(0.0, 1.0))
    centre_c = (edge[1:] + edge[:-1]) / 2
    below_c, sum_c = np.cumsum(count_c)[:-1], np.cumsum(count_c * centre_c)
    above_c = value_hw.size - below_c
    # 0 and 1 both occur in what comes in, so neither class is ever empty.
    between_c = below_c * above_c * (sum_c[:-1] / below_c - (sum_c[-1] - sum_c[:-1]) / above_c) ** 2
    return float(edge[1 + int(np.argmax(between_c))])


def _opened(mask_hw: Array, radius: float) -> Array:
    """Opening with a disc, by two distance transforms; beyond the border the image goes on as at its edge."""
    margin = int(np.ceil(radius)) + 1
    wide_hw = np.pad(mask_hw, margin, mode="edge")
    core_hw = wide_hw if wide_hw.all() else ndimage.distance_transform_edt(wide_hw) > radius
    if not core_hw.any() or core_hw.all():
        return np.asarray(core_hw[margin:-margin, margin:-margin])
    opened_hw = ndimage.distance_transform_edt(~core_hw) <= radius
    return np.asarray(opened_hw[margin:-margin, margin:-margin])


def _largest(mask_hw: Array) -> Array:
    """The largest 4-connected component."""
    label_hw, _ = ndimage.label(mask_hw)
    return np.asarray(label_hw == 1 + int(np.argmax(np.bincount(label_hw.ravel())[1:])))
