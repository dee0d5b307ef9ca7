"""The published system's side of a parity test: its weights, its input, its numbers, and its names for our parts."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
MEAN, STD = 0.3089279, 0.25053555408335154
B2_STAGE_LENGTHS = (2, 3, 3, 4, 4, 5, 2)
TINY_CORNERS_YX = (((256, 0), (512, 128), (768, 256)), ((700, 300), (64, 64), (1000, 500)))


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def published_state(name: str) -> dict[str, Tensor]:
    """The published state dict of a configuration, generated from its keys by the rule in spec.json."""
    keys = json.loads((DATA / f"keys_{name}.json").read_text())["keys"]
    return {key: _weight(key, tuple(shape), dtype) for key, shape, dtype in keys}


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


def pad_as_published(net: nn.Module) -> None:
    """Give timm's EfficientNet-B2 the published static padding (computed for a 260-pixel input)."""
    _pad_before(net, "conv_stem")
    _pad_before(net.get_submodule("blocks.1.0"), "conv_dw")


def _pad_before(parent: nn.Module, name: str) -> None:
    conv = parent.get_submodule(name)
    conv.padding = (0, 0)  # type: ignore[assignment]
    conv.register_forward_pre_hook(lambda _module, inputs: (nn.functional.pad(inputs[0], (0, 1, 0, 1)),))


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_key(key): value for key, value in state.items()}


def our_key(key: str) -> str:
    """The published name of a parameter -> ours."""
    for prefix in ("inst_encoder.backbone.", "inst_encoder._"):
        if key.startswith(prefix):
            return "backbone.net." + _encoder_key(key.removeprefix(prefix.removesuffix("_")))
    for pattern, replacement in _RULES:
        key, changed = re.subn(pattern, replacement, key)
        if changed:
            break
    for published, ours in _PARTS.items():
        key = key.replace(published, ours)
    return key


_STRIDE = {"0": "16", "1": "32"}
_RULES: tuple[tuple[str, Any], ...] = (
    (r"^inst_encoder\.inner_blocks\.inner_block_(\d)\.0", lambda m: f"pyramid.lateral.{_STRIDE[m[1]]}"),
    (r"^inst_encoder\.layer_blocks\.layer_block_(\d)\.0", lambda m: f"pyramid.refine.{_STRIDE[m[1]]}"),
    (r"^side_inst_aggregator\.encoders\.encoder_(\d+)\.0\.0\.", r"branches.\1.encoder.linear."),
    (r"^side_inst_aggregator\.encoders\.encoder_(\d+)\.", r"branches.\1.encoder.blocks."),
    (r"^side_inst_aggregator\.aggregators\.aggregator_(\d+)\.", r"branches.\1.pooling."),
    (r"^encoder\.0\.0\.", "branches.256.encoder.linear."),
    (r"^aggregator\.", "branches.256.pooling."),
    (r"^region_aggregator\.encoder\.", "region.encoder.blocks."),
    (r"^region_aggregator\.aggregator\.", "region.pooling."),
    (r"^side_classifiers\.classifier_(\d+)\.head_classifier\.", r"branches.\1.head."),
    (r"^scale_aggregator\.", "scale_attention."),
    (r"^classifier\.head_classifier\.", "classifier."),
)
_PARTS = {
    "attention_V.0": "hidden.value",
    "attention_U.0": "hidden.gate",
    "attention_weights": "score",
    ".I": ".inducing_1MD",
    ".S": ".seed_1KD",
}
_BLOCK_PARTS = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_depthwise_conv": "conv_dw"}
_FIRST_PARTS = {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_PARTS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}


def _encoder_key(key: str) -> str:
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([{"_conv_stem": "conv_stem", "_bn0": "bn1"}[parts[0]], *parts[1:]])
    stage, index = 0, int(parts[1])
    while index >= B2_STAGE_LENGTHS[stage]:
        index -= B2_STAGE_LENGTHS[stage]
        stage += 1
    names = {**_BLOCK_PARTS, **(_FIRST_PARTS if stage == 0 else _LATER_PARTS)}
    return ".".join(["blocks", str(stage), str(index), names[parts[2]], *parts[3:]])
