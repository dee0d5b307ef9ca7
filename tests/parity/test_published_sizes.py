"""With one label, models have the published numbers of parameters, all in all and where they train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from msmil.config import ModelConfig
from msmil.models.backbone import set_trainable
from msmil.models.build import build_model
from msmil.models.mil import MILModel

PUBLISHED_B2: dict[str, Any] = {"bn_eps": 1e-3, "bn_momentum": 0.01}
ABMIL = ModelConfig(
    in_channels=3,
    backbone_options=PUBLISHED_B2,
    drop_path_rate=0.2,
    encoder_dropout=0.25,
    attention_dropout=0.25,
)
SETTRANS = ModelConfig(
    in_channels=3,
    backbone_options=PUBLISHED_B2,
    drop_path_rate=0.2,
    mil_encoder="isab",
    encoder_layer_norm=True,
    pooling="pma",
    attention_dropout=0.25,
)


def build(config: ModelConfig) -> MILModel:
    """For the published training geometry: 6 tiles of 512 pixels of an image padded to 1536 x 1024. Shapes alone."""
    with torch.device("meta"):
        return build_model(config, num_labels=1, padded_hw=(1536, 1024), tile_hw=(512, 512), tiles=6)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SETTRANS, 12_580_743),
        (replace(SETTRANS, nested=True), 13_894_279),
        (replace(SETTRANS, instance_encoder="single", scales=(256,)), 8_604_931),
    ],
    ids=["settrans", "nested-settrans", "single-settrans"],
)
def test_auto_inducing_points_give_the_published_number_of_parameters(config: ModelConfig, count: int) -> None:
    """The others are counted where published keys are converted (test_convert)."""
    assert sum(p.numel() for p in build(config).parameters()) == count


def test_finetuning_eight_blocks_trains_what_the_published_run_trains() -> None:
    """Measured there: 46 tensors of 1,763,592 parameters outside the backbone, 104 of 6,022,568 inside."""
    model = build(ABMIL)
    set_trainable(model, 8)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in trained if name.startswith("backbone.")]
    outside = [p for name, p in trained if not name.startswith("backbone.")]
    assert (len(outside), sum(p.numel() for p in outside)) == (46, 1_763_592)
    assert (len(inside), sum(p.numel() for p in inside)) == (104, 6_022_568)
