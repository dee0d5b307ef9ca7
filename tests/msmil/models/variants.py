"""The variants of the model, each small enough for a test: what a configuration says, and tiles for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msmil.config import ModelConfig
from msmil.models.build import build_model
from msmil.models.mil import MILModel
from tests.msmil.models.small import SMALL_BACKBONE, TILE_PX, small_config

SETS: dict[str, Any] = {"mil_encoder": "isab", "encoder_layer_norm": True, "pooling": "pma"}
SINGLE: dict[str, Any] = {"instance_encoder": "single", "scales": (48,), "inducing_points": "auto"}
MSP: dict[str, Any] = {"instance_encoder": "msp", "scales": (32, 48, 64), "inducing_points": "auto"}
TWO: dict[str, Any] = {"scales": (16, 32), "inducing_points": "auto"}

VARIANTS: dict[str, dict[str, Any]] = {
    "backbone_pyramid": {**TWO, "instance_encoder": "backbone_pyramid"},
    "bilinear_norm": {**TWO, "upsample": "bilinear", "pyramid_norm": True},
    "max": {**TWO, "pooling": "max"},
    "mean": {**TWO, "pooling": "mean", "attention": "shared"},
    "sparsemax": {**TWO, "pooling": "attention", "probability": "sparsemax"},
    "entmax15": {**TWO, **SETS, "pma_heads": 2, "probability": "entmax15"},
    "entmax_alpha": {**TWO, "probability": "entmax_alpha"},
    "concatenation": {**TWO, "scale_aggregator": "concatenation"},
    "concatenation_max": {**TWO, "scale_aggregator": "concatenation", "pooling": "max", "deep_supervision": False},
    "mean_p": {**TWO, "scale_aggregator": "mean_p"},
    "max_p": {**TWO, "scale_aggregator": "max_p", "mil_encoder": "sab"},
    "attention": {**TWO, "scale_aggregator": "attention", "attention": "shared"},
    "attention_mean": {**TWO, "scale_aggregator": "attention", "pooling": "mean"},
    "single": SINGLE,
    "single_sets": {**SINGLE, **SETS},
    "msp": MSP,
    "msp_sets": {**MSP, **SETS, "deep_supervision": False, "scale_aggregator": "attention"},
    "nested": {**TWO, "nested": True},
    "nested_sets": {**TWO, **SETS, "nested": True, "attention": "shared"},
    "nested_mean_max": {**TWO, "nested": True, "pooling": "mean", "region_pooling": "max"},
    "nested_mixed": {**TWO, "nested": True, "region_mil_encoder": "sab", "region_pooling": "mean",
                     "instance_encoder": "backbone_pyramid", "scale_aggregator": "mean_p"},
    "nested_region_attention": {**TWO, "nested": True, "pooling": "mean", "region_pooling": "attention",
                                "probability": "entmax_alpha"},
}  # fmt: skip


def variant_config(name: str, **changes: Any) -> ModelConfig:
    # timm's zeros at the end of a block would stop gradients
    options = {**SMALL_BACKBONE["backbone_options"], "zero_init_last": False}
    return small_config(**{"backbone_options": options, **VARIANTS[name], **changes})


def variant_model(name: str, *, labels: int = 2, seed: int = 0, **changes: Any) -> MILModel:
    torch.manual_seed(seed)
    hw = (TILE_PX, TILE_PX)
    config = variant_config(name, **changes)
    return build_model(config, num_labels=labels, padded_hw=(128, 64), tile_hw=hw, tiles=2)


def variant_tiles(model: MILModel, bags: int, tiles: int, *, seed: int = 1) -> Tensor | dict[int, Tensor]:
    """Random float64 tiles as the model wants them; msp has more tiles of the smaller sizes."""
    generator = torch.Generator().manual_seed(seed)

    def random(count: int, side: int) -> Tensor:
        return torch.randn(bags, count, model.in_channels, side, side, generator=generator, dtype=torch.float64)

    if model.layout == "sizes":
        return {size: random(tiles + 2 - i, size) for i, size in enumerate(model.scales)}
    return random(tiles, model.scales[0] if model.layout == "single" else TILE_PX)
