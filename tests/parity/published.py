"""The published system's side of a parity test: its weights, its input, its numbers."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
MEAN, STD = 0.3089279, 0.25053555408335154
TINY_CORNERS_YX = (((256, 0), (512, 128), (768, 256)), ((700, 300), (64, 64), (1000, 500)))


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def published_state(name: str) -> dict[str, Tensor]:
    """The published state dict of a configuration, generated from its keys as spec.json says; only to be read."""
    keys = json.loads((DATA / f"keys_{name}.json").read_text())["keys"]
    return {key: _weight(key, tuple(shape), dtype) for key, shape, dtype in keys}


@functools.cache
def _weight(key: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    if dtype.startswith("int"):
        return torch.zeros(shape, dtype=torch.int64)
    n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return torch.from_numpy(np.float32(1) + np.float32(0.1) * np.abs(n))
    if n.ndim == 1:
        scale = np.float32(0.05) * n
        return torch.from_numpy(np.float32(1) + scale if key.endswith("weight") else scale)
    return torch.from_numpy(np.float32(_gain(key, n.ndim) / math.sqrt(math.prod(shape[1:]))) * n if n.ndim != 3 else n)


def _gain(key: str, ndim: int) -> float:
    if ndim != 4 or "inner_block" in key or "layer_block" in key:
        return 1.0
    return 0.5 if "_se_" in key else 1.55


def padded_image_HW() -> Tensor:
    """The golden image, normalised and padded with black to 1536 x 1024 on the right and at the bottom."""
    image = torch.from_numpy(golden("input")["image"].astype(np.float32)) / 255
    return nn.functional.pad((image - MEAN) / STD, (0, 1024 - 912, 0, 1536 - 1520), value=(0 - MEAN) / STD)


def full_bag() -> Tensor:
    """The padded image as one bag of six tiles of 512 pixels, [1, 6, 3, 512, 512]."""
    tiles_YXPP = padded_image_HW().unfold(0, 512, 512).unfold(1, 512, 512)
    return tiles_YXPP.flatten(0, 1)[None, :, None].expand(-1, -1, 3, -1, -1)


def tiny_bags() -> Tensor:
    """Two bags of three crops of 128 pixels, [2, 3, 3, 128, 128]."""
    image = padded_image_HW()
    bags = [[image[y : y + 128, x : x + 128] for y, x in corners] for corners in TINY_CORNERS_YX]
    return torch.stack([torch.stack(bag) for bag in bags])[:, :, None].expand(-1, -1, 3, -1, -1).contiguous()
