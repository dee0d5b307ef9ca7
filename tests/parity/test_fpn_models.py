"""With one label, the model is the published one: same parameters, same numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msmil.config import ModelConfig
from msmil.models.build import build_model
from msmil.models.mil import MILModel
from msmil.types import BagOutput
from tests.parity.published import golden, our_state, pad_as_published, published_state, tiny_bags

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
def settrans() -> tuple[MILModel, dict[int, Tensor], BagOutput, dict[str, np.ndarray]]:
    """The set transformer's encoder, pooling and heads; its scale aggregator (concatenation) is another one."""
    model = build(SETTRANS)
    pad_as_published(model.backbone.net)
    state = our_state(published_state("fpn_settrans_concat"))
    kept = {key: value for key, value in state.items() if not key.startswith(("scale_attention.", "classifier."))}
    report = model.load_state_dict(kept, strict=False)
    assert not report.unexpected_keys
    assert {key.split(".")[0] for key in report.missing_keys} == {"scale_attention", "classifier"}
    embeddings: dict[int, Tensor] = {}
    for scale, branch in model.branches.items():
        branch.pooling.register_forward_hook(
            lambda _module, _inputs, pooled, scale=int(scale): embeddings.update({scale: pooled.embedding_BKD})
        )
    with torch.inference_mode():
        output = model.eval()(tiny_bags())
    return model, embeddings, output, golden("fpn_settrans_concat")


def test_abmil_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in build(ABMIL).parameters()) == 8_966_154


def test_settrans_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in build(SETTRANS).parameters()) == 12_580_743


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
    _, _, output, array = settrans()
    check_branches(output, array, tolerance=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_settrans_embeddings(scale: int) -> None:
    _, embeddings, _, array = settrans()
    assert difference(embeddings[scale][:, 0], array[f"tiny/bag_{scale}"]) <= 1e-4


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
