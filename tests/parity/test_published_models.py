"""Whole published checkpoints, loaded as a user loads them, give the published numbers.

`pytest tests/parity -s` prints the largest differences. Case `tiny`: two bags of three crops; `full`: one whole image.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import msmil
from msmil.types import BagOutput
from tests.parity.published import full_bag, golden, published_state, tiny_bags

pytestmark = pytest.mark.slow

BOUND, BOUND_F64 = 1e-4, 1e-6
ATTENTION_BOUND = {"fpn_abmil": 1e-6, "fpn_settrans_concat": 1e-6, "nested_settrans": 1e-6, "single_abmil": 1e-5}
CONFIGS = ("fpn_abmil", "fpn_settrans_concat", "nested_settrans", "single_abmil")
CASES = [*((name, "tiny") for name in CONFIGS), ("fpn_settrans_concat", "full")]  # full: concatenation's scale weights


@functools.cache
def model(name: str) -> nn.Module:
    """In float64."""
    tensors = published_state(name)
    return msmil.load_published({k: v.double() if v.is_floating_point() else v for k, v in tensors.items()})


@functools.cache
def output(name: str, case: str, dtype: torch.dtype) -> BagOutput:
    network = model(name) if dtype == torch.float64 else copy.deepcopy(model(name)).to(dtype)
    with torch.inference_mode():
        return network(tiles(case).to(dtype))  # type: ignore[no-any-return]


def tiles(case: str) -> Tensor:
    return tiny_bags() if case == "tiny" else full_bag()


def ours(result: BagOutput) -> dict[str, Tensor]:
    """Our numbers under the golden names; the models have one label."""
    found = {"logits": result.logit_BK[:, 0]}
    if result.scale_logit_SBK is not None:
        found["side_logits"] = result.scale_logit_SBK[:, :, 0].T
    if result.scale_weight_BKS is not None:
        found["scale_scores"] = result.scale_weight_BKS[:, 0]
    for scale, weight_BKI in (result.attention or {}).items():
        found[f"scores_{scale}"] = weight_BKI[:, 0]
    for scale, weight_BKNI in (result.inner_attention or {}).items():
        found[f"inner_scores_{scale}"] = weight_BKNI[:, 0]
    if "scores_256" in found:
        found["scores"] = found.pop("scores_256")  # a single scale has no name there
    return found


@pytest.mark.parametrize(("name", "case"), CASES)
def test_in_single_precision(name: str, case: str) -> None:
    found, array = ours(output(name, case, torch.float32)), golden(name)
    names = {key.removeprefix(f"{case}/") for key in array if key.startswith(f"{case}/")}
    compared = {key for key in found if key in names}
    assert compared >= {"logits", "side_logits"} & names
    for key in sorted(compared):
        expected = array[f"{case}/{key}"].reshape(found[key].shape)
        worst = float(np.max(np.abs(found[key].numpy() - expected) / np.maximum(1, np.abs(expected))))
        print(f"\n{name} {case} {key}: max difference {worst:.1e}", end="")
        # the weights of thousands of instances are far below 1, those of a few tiles are not
        attention = key.startswith(("scores", "inner_scores"))
        assert worst <= (ATTENTION_BOUND[name] if attention else BOUND)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_double_precision(name: str) -> None:
    found, array = ours(output(name, "tiny", torch.float64)), golden(name)
    for key in ("logits", "side_logits"):
        if f"tiny/{key}_f64" in array:
            relative = np.max(np.abs(found[key].numpy() / array[f"tiny/{key}_f64"] - 1))
            print(f"\n{name} tiny {key} in float64: max relative difference {relative:.1e}", end="")
            assert relative <= BOUND_F64


def test_grey_tiles_stand_for_three_equal_channels() -> None:
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in published_state("fpn_abmil").items()}
    expected = output("fpn_abmil", "tiny", torch.float64).logit_BK
    grey = tiny_bags()[:, :, :1].double()
    for network in (model("fpn_abmil"), msmil.load_published(tensors, config={"in_channels": 1})):
        with torch.inference_mode():
            np.testing.assert_allclose(network(grey).logit_BK, expected, rtol=1e-10)


def test_each_scale_has_the_published_embedding() -> None:
    name, embeddings = "fpn_settrans_concat", {}
    network = copy.deepcopy(model(name)).float()
    for scale in (16, 32, 128):
        network.get_submodule(f"branches.{scale}.pooling").register_forward_hook(
            lambda _module, _inputs, pooled, scale=scale: embeddings.update({scale: pooled.embedding_BKD[:, 0]})
        )
    with torch.inference_mode():
        network(tiny_bags())
    for scale, embedding_BD in embeddings.items():
        np.testing.assert_allclose(embedding_BD, golden(name)[f"tiny/bag_{scale}"], atol=BOUND, rtol=0)
