"""How often the peak of a map lies in a box of its label, and how often chance would put it there.

B images, K labels, M kinds of map, H W pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.types import Box

Array = NDArray[Any]

_IMAGES, _HITS, _CHANCE = 0, 1, 2
_COLUMNS: Final = 3


class PeakHits:
    """Counts over images, batch by batch. An image counts for the labels of which it has a box.

    Args:
        labels: in the order of the maps' labels.
        map_names: of the maps that will be given (`heatmap.map_names`).

    `count_KM3` holds, per label and map, the images, the hits and the sum of chances (float64); the counts of several
    ranks are added up by adding these arrays.
    """

    def __init__(self, labels: Sequence[str], map_names: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.map_names = tuple(map_names)
        self.count_KM3 = np.zeros((len(self.labels), len(self.map_names), _COLUMNS), np.float64)

    def add(self, maps: Mapping[str, Tensor], breast_BHW: Tensor, boxes: Sequence[Sequence[Box]]) -> None:
        """Count a batch.

        Args:
            maps: {map name: [B, K, H, W]} (`Maps.named`).
            breast_BHW: bool, on the same device, no image empty; the peak is looked for inside.
            boxes: of each image, of any label, in stored pixels.

        The peak is the pixel with the highest value, the first in reading order among equals. It hits where its centre
        (x + 0.5, y + 0.5) lies in a box of the label. Chance is the share of the breast's pixels that would hit.
        """
        assert set(maps) == set(self.map_names), f"maps {sorted(maps)} instead of {sorted(self.map_names)}"
        assert len(boxes) == len(breast_BHW), f"boxes of {len(boxes)} images for {len(breast_BHW)}"
        peak_MBK = np.stack([peaks(maps[name], breast_BHW) for name in self.map_names])
        width = breast_BHW.shape[2]
        for b, boxes_of_image in enumerate(boxes):
            if not boxes_of_image:
                continue
            breast_HW = breast_BHW[b].cpu().numpy()
            for k, label in enumerate(self.labels):
                mine = [box for box in boxes_of_image if box.label == label]
                if not mine:
                    continue
                hit_HW = box_mask(mine, (breast_HW.shape[0], width))
                self.count_KM3[k, :, _IMAGES] += 1
                self.count_KM3[k, :, _HITS] += hit_HW.ravel()[peak_MBK[:, b, k]]
                self.count_KM3[k, :, _CHANCE] += hit_HW[breast_HW].mean()

    def results(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """{label: {map name: {images, hits, rate, chance, ratio}}}; None where there was no image, or no chance."""
        found: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for k, label in enumerate(self.labels):
            found[label] = {}
            for m, name in enumerate(self.map_names):
                images, hits, chances = self.count_KM3[k, m].tolist()
                found[label][name] = {
                    "images": int(images),
                    "hits": int(hits),
                    "rate": hits / images if images else None,
                    "chance": chances / images if images else None,
                    "ratio": hits / chances if chances else None,
                }
        return found


def peaks(map_BKHW: Tensor, breast_BHW: Tensor) -> Array:
    """Position (y * W + x) of the highest value inside the breast, int64 [B, K]."""
    assert bool(breast_BHW.flatten(1).any(dim=1).all()), "an image without breast has no peak"
    inside_BKHW = map_BKHW.masked_fill(~breast_BHW[:, None], -torch.inf)
    position_BK: Array = inside_BKHW.flatten(2).argmax(dim=2).cpu().numpy()
    return position_BK


def box_mask(boxes: Sequence[Box], image_hw: tuple[int, int]) -> Array:
    """Pixels whose centre lies in one of the boxes, bool [H, W]; an end x1 or y1 is exclusive."""
    y_H1, x_1W = np.arange(image_hw[0])[:, None] + 0.5, np.arange(image_hw[1])[None, :] + 0.5
    mask_HW = np.zeros(image_hw, np.bool_)
    for box in boxes:
        mask_HW |= (y_H1 >= box.y0) & (y_H1 < box.y1) & (x_1W >= box.x0) & (x_1W < box.x1)
    return mask_HW
