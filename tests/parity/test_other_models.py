"""With one label, single-scale and nested models are the published ones."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from msmil.types import BagOutput
from tests.parity.published import golden, our_state, pad_as_published, published_state, tiny_bags
from tests.parity.test_fpn_models import ABMIL, SCALES, SETTRANS, build, check_branches, difference

CONFIGS = {
    "single_abmil": replace(ABMIL, instance_encoder="single", scales=(256,), deep_supervision=False),
    "nested_settrans": replace(SETTRANS, nested=True),
}


@functools.cache
def run(name: str, dtype: torch.dtype = torch.float32) -> tuple[BagOutput, dict[str, np.ndarray]]:
    model = build(CONFIGS[name]).to(dtype)
    pad_as_published(model.backbone.net)
    model.load_state_dict(our_state(published_state(name)), strict=True)
    with torch.inference_mode():
        return model.eval()(tiny_bags().to(dtype)), golden(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str) -> None:
    output, array = run(name)
    bound = 1e-4 * np.maximum(1, np.abs(array["tiny/logits"]))
    assert (np.abs(output.logit_BK[:, 0].numpy() - array["tiny/logits"]) <= bound).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_in_double_precision(name: str) -> None:
    output, array = run(name, torch.float64)
    np.testing.assert_allclose(output.logit_BK[:, 0], array["tiny/logits_f64"], rtol=1e-6)
    if output.scale_logit_SBK is not None:
        np.testing.assert_allclose(output.scale_logit_SBK[:, :, 0].T, array["tiny/side_logits_f64"], rtol=1e-6)


def test_a_single_scale_has_one_attention_and_nothing_per_scale() -> None:
    output, array = run("single_abmil")
    assert output.attention is not None
    assert difference(output.attention[256][:, 0], array["tiny/scores"]) <= 1e-5
    assert output.scale_logit_SBK is None
    assert output.scale_weight_BKS is None


def test_nested_attention_over_regions_and_side_logits() -> None:
    check_branches(*run("nested_settrans"), tolerance=1e-4)


def test_nested_scale_weights() -> None:
    output, array = run("nested_settrans")
    assert output.scale_weight_BKS is not None
    assert difference(output.scale_weight_BKS[:, 0], array["tiny/scale_scores"]) <= 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_nested_attention_inside_each_region(scale: int) -> None:
    output, array = run("nested_settrans")
    assert output.inner_attention is not None
    assert difference(output.inner_attention[scale][:, 0], array[f"tiny/inner_scores_{scale}"]) <= 1e-6
