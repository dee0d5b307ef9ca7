"""With one label, the model is the published one: same parameters, same numbers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msmil.config import ModelConfig
from msmil.models.build import build_model
from msmil.models.mil import MILModel
from msmil.types import BagOutput
from tests.parity.published import full_bag, golden, our_state, pad_as_published, published_state, tiny_bags

SCALES = (16, 32, 128)
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

SETTRANS_CONCAT = replace(SETTRANS, scale_aggregator="concatenation")


def build(config: ModelConfig) -> MILModel:
    """For the published training geometry: 6 tiles of 512 pixels of an image padded to 1536 x 1024."""
    return build_model(config, num_labels=1, padded_hw=(1536, 1024), tile_hw=(512, 512), tiles=6)


def difference(ours: Tensor, published: np.ndarray) -> float:
    return float((ours.detach().double() - torch.from_numpy(published).double()).abs().max())


def check_branches(output: BagOutput, array: dict[str, np.ndarray], *, tolerance: float) -> None:
    assert output.scale_logit_SBK is not None
    assert output.attention is not None
    assert difference(output.scale_logit_SBK[:, :, 0].T, array["tiny/side_logits"]) <= tolerance
    for scale in SCALES:
        assert (
            difference(output.attention[scale][:, 0], array[f"tiny/scores_{scale}"]) <= tolerance / 100
        )  # small numbers


@functools.cache
def abmil(dtype: torch.dtype) -> tuple[BagOutput, dict[str, np.ndarray]]:
    model = build(ABMIL).to(dtype)
    pad_as_published(model.backbone.net)
    model.load_state_dict(our_state(published_state("fpn_abmil")), strict=True)
    with torch.inference_mode():
        return model.eval()(tiny_bags().to(dtype)), golden("fpn_abmil")


@functools.cache
def settrans() -> tuple[MILModel, dict[str, np.ndarray]]:
    model = build(SETTRANS_CONCAT)
    pad_as_published(model.backbone.net)
    model.load_state_dict(our_state(published_state("fpn_settrans_concat")), strict=True)
    return model.eval(), golden("fpn_settrans_concat")


@functools.cache
def settrans_tiny() -> tuple[dict[int, Tensor], BagOutput, dict[str, np.ndarray]]:
    model, array = settrans()
    embeddings: dict[int, Tensor] = {}
    for scale, branch in model.branches.items():
        branch.pooling.register_forward_hook(
            lambda _module, _inputs, pooled, scale=int(scale): embeddings.update({scale: pooled.embedding_BKD})
        )
    with torch.inference_mode():
        return embeddings, model(tiny_bags()), array


def test_abmil_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in build(ABMIL).parameters()) == 8_966_154


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SETTRANS, 12_580_743),
        (SETTRANS_CONCAT, 12_515_334),
        (replace(ABMIL, scale_aggregator="concatenation"), 8_900_745),
        (replace(ABMIL, nested=True), 9_097_867),
        (replace(SETTRANS, nested=True), 13_894_279),
        (replace(ABMIL, instance_encoder="single", scales=(256,), deep_supervision=False), 7_359_108),
        (replace(SETTRANS, instance_encoder="single", scales=(256,), deep_supervision=False), 8_604_931),
    ],
    ids=["settrans", "settrans-concatenation", "abmil-concatenation", "nested-abmil", "nested-settrans", "single-abmil",
         "single-settrans"],
)  # fmt: skip
def test_variants_have_the_published_number_of_parameters(config: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == count


def test_abmil_logits() -> None:
    output, array = abmil(torch.float32)
    assert difference(output.logit_BK[:, 0], array["tiny/logits"]) <= 1e-4


def test_abmil_branches() -> None:
    check_branches(*abmil(torch.float32), tolerance=1e-4)


def test_abmil_scale_weights() -> None:
    output, array = abmil(torch.float32)
    assert output.scale_weight_BKS is not None
    assert difference(output.scale_weight_BKS[:, 0], array["tiny/scale_scores"]) <= 1e-4


def test_abmil_in_double_precision() -> None:
    output, array = abmil(torch.float64)
    assert output.scale_logit_SBK is not None
    np.testing.assert_allclose(output.logit_BK[:, 0], array["tiny/logits_f64"], rtol=1e-6)
    np.testing.assert_allclose(output.scale_logit_SBK[:, :, 0].T, array["tiny/side_logits_f64"], rtol=1e-6)


def test_settrans_branches() -> None:
    _, output, array = settrans_tiny()
    check_branches(output, array, tolerance=1e-4)


def test_settrans_concatenation_logits() -> None:
    _, output, array = settrans_tiny()
    assert difference(output.logit_BK[:, 0], array["tiny/logits"]) <= 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_settrans_embeddings(scale: int) -> None:
    embeddings, _, array = settrans_tiny()
    assert difference(embeddings[scale][:, 0], array[f"tiny/bag_{scale}"]) <= 1e-4


def test_concatenation_has_the_published_scale_weights() -> None:
    """The published code computes them for one bag alone, so the whole image is needed."""
    model, array = settrans()
    with torch.inference_mode():
        output = model(full_bag())
    assert output.scale_weight_BKS is not None
    assert difference(output.scale_weight_BKS[:, 0], array["full/scale_scores"].reshape(1, 3)) <= 1e-4
    assert difference(output.logit_BK[:, 0], array["full/logits"]) <= 1e-4
    for scale in SCALES:
        assert difference(output.attention[scale][:, 0], array[f"full/scores_{scale}"]) <= 1e-6


def test_finetuning_eight_blocks_trains_what_the_published_run_trains() -> None:
    """Measured there: 46 tensors of 1,763,592 parameters outside the backbone, 104 of 6,022,568 inside."""
    from msmil.models.backbone import set_trainable

    model = build(ABMIL)
    set_trainable(model, 8)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in trained if name.startswith("backbone.")]
    outside = [p for name, p in trained if not name.startswith("backbone.")]
    assert (len(outside), sum(p.numel() for p in outside)) == (46, 1_763_592)
    assert (len(inside), sum(p.numel() for p in inside)) == (104, 6_022_568)
