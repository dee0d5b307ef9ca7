"""A model small enough for a test, of the same parts as the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from msmil.config import ModelConfig
from msmil.models.build import build_model
from msmil.models.mil import MILModel

SMALL_BACKBONE: dict[str, Any] = {
    "backbone": "resnet10t",
    "backbone_options": {"channels": [8, 8, 16, 16], "stem_width": 8},
}
TILE_PX = 64


def small_config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        **SMALL_BACKBONE,
        "scales": (16, 32, 64),
        "fpn_dim": 16,
        "encoder_dim": 16,
        "attention_dim": 8,
        "encoder_heads": 2,
        "inducing_points": (3, 3, 2),
        **changes,
    }
    return ModelConfig(**settings)


def small_model(*, labels: int = 2, seed: int = 0, **changes: Any) -> MILModel:
    torch.manual_seed(seed)
    hw = (TILE_PX, TILE_PX)
    return build_model(small_config(**changes), num_labels=labels, padded_hw=hw, tile_hw=hw, tiles=1)


def random_tiles(bags: int, tiles: int, *, seed: int = 1, hw: tuple[int, int] = (TILE_PX, TILE_PX)) -> torch.Tensor:
    return torch.randn(bags, tiles, 1, *hw, generator=torch.Generator().manual_seed(seed))


def with_backbone(backbone: nn.Module) -> nn.Module:
    model = nn.Module()
    model.backbone = backbone
    return model
