"""What holds for every variant of the model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from msmil.config import LossConfig
from msmil.config_checks import has_fused_head
from msmil.engine.losses import BagLoss
from msmil.models.backbone import freeze_statistics
from msmil.models.mil import MILModel
from msmil.types import BagOutput
from shards.errors import UserError
from tests.msmil.models.test_mil import tensors
from tests.msmil.models.variants import VARIANTS, variant_config, variant_model, variant_tiles

pytestmark = pytest.mark.slow

every_variant = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def double_model(name: str) -> MILModel:
    return variant_model(name).double().eval()


def by_size(value: Any, function: Any) -> Any:
    return {size: function(part) for size, part in value.items()} if isinstance(value, dict) else function(value)


def mask_of(tiles: Any, real: list[int]) -> Any:
    """The first tiles of the first bag, the last ones of the second.. are real."""

    def one(part: Tensor) -> Tensor:
        count = part.shape[1]
        return torch.stack([torch.arange(count).roll(b) < min(n, count) for b, n in enumerate(real)])

    return by_size(tiles, one)


def keep(tiles: Any, mask: Any, b: int) -> Any:
    if isinstance(tiles, dict):
        return {size: part[b : b + 1, mask[size][b]] for size, part in tiles.items()}
    return tiles[b : b + 1, mask[b]]


def hide(tiles: Any, mask: Any) -> Any:
    """Garbage where the padding is."""

    def one(part: Tensor, real: Tensor) -> Tensor:
        return torch.where(real[:, :, None, None, None], part, float("nan"))

    return {s: one(part, mask[s]) for s, part in tiles.items()} if isinstance(tiles, dict) else one(tiles, mask)


def asks(model: MILModel) -> dict[str, Any]:
    return {"instance_logits": True, "composite_shares": (0.1, 1.0)} if model.judges_instances else {}


@every_variant
@pytest.mark.parametrize("real", [[1, 3], [2, 1]], ids=str)
def test_a_padded_bag_gives_what_the_unpadded_one_gives(name: str, real: list[int]) -> None:
    model = double_model(name)
    tiles = variant_tiles(model, len(real), 3)
    mask = mask_of(tiles, real)
    with torch.no_grad():
        padded = tensors(model(hide(tiles, mask), mask, **asks(model)))
        for b in range(len(real)):
            bare = tensors(model(keep(tiles, mask, b), **asks(model)))
            assert set(bare) == set(padded)
            for key, value in bare.items():
                got = padded[key][:, b : b + 1] if key == "scale_logit_SBK" else padded[key][b : b + 1]
                mask_N = mask[int(key.partition("/")[2])][b] if isinstance(mask, dict) and "/" in key else mask
                mask_N = mask_N if isinstance(mask_N, dict) or mask_N.dim() == 1 else mask_N[b]
                if key.startswith("inner_attention"):
                    assert (got[:, :, ~mask_N] == 0).all()
                    got = got[:, :, mask_N]
                elif "/" in key and not key.startswith("composite"):
                    real_I = mask_N.repeat_interleave(got.shape[-1] // len(mask_N))
                    filler = 0.0 if key.startswith("attention") else float("-inf")
                    assert (got[..., ~real_I] == filler).all(), key
                    got = got[..., real_I]
                torch.testing.assert_close(got, value, msg=key)


@every_variant
def test_a_fully_padded_bag_is_refused(name: str) -> None:
    model = double_model(name)
    tiles = variant_tiles(model, 2, 2)
    mask = mask_of(tiles, [1, 0])
    with pytest.raises(UserError, match=r"bags \[1\] of the batch have no real tile"):
        model(tiles, mask)


@every_variant
def test_shapes_and_sums(name: str) -> None:
    """Everything has K labels; weights sum to 1; what a variant does not define is not there."""
    model, config = double_model(name), variant_config(name)
    with torch.no_grad():
        output: BagOutput = model(variant_tiles(model, 2, 3), **asks(model))
    scales = config.scales
    single, nested = config.instance_encoder == "single", config.nested
    assert output.scales == scales
    assert output.logit_BK.shape == (2, 2)
    side = config.deep_supervision and not single
    assert (output.scale_logit_SBK is not None) == side
    if side:
        assert output.scale_logit_SBK.shape == (len(scales), 2, 2)
    last = config.region_pooling if nested and config.region_pooling != "same" else config.pooling
    assert (output.attention is not None) == (last not in ("max", "mean"))
    assert (output.inner_attention is not None) == (nested and config.pooling not in ("max", "mean"))
    for weights in (output.attention or {}, output.inner_attention or {}):
        for weight in weights.values():
            assert weight.shape[:2] == (2, 2)
            torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
    assert (output.scale_weight_BKS is None) == (single or config.scale_aggregator == "max_p")
    if output.scale_weight_BKS is not None:
        torch.testing.assert_close(output.scale_weight_BKS.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert model.has_attention == bool(output.attention or output.inner_attention)
    assert (output.instance_logit is not None) == model.judges_instances == (not nested and (side or single))


@every_variant
def test_one_training_step(name: str) -> None:
    """The real loss reaches every parameter, and a step lowers it."""
    config, model = variant_config(name), variant_model(name).double()
    freeze_statistics(model)
    extra = {"instance_weight": 0.5, "composite_weight": 0.5} if model.judges_instances else {}
    loss = BagLoss(LossConfig(**extra), [1.0, 2.0], fused_head=has_fused_head(config)).double()
    tiles, label_BK = variant_tiles(model, 2, 2), torch.tensor([[1, 0], [0, -1]], dtype=torch.int8)
    asked = asks(model) if extra else {}
    asked |= {"composite_shares": LossConfig().top_fractions} if extra else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    values = []
    for _ in range(2):
        parts = loss(model(tiles, **asked), label_BK, torch.ones(2), global_count=4)
        values.append(parts.total.item())
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    largest = {key: float(p.grad.abs().max()) for key, p in model.named_parameters()}
    # a constant added to all scores changes no weight: these biases alone have a gradient of zero
    shifts = {key for key in largest if key.endswith(("score.bias", "fc_k.bias"))}
    assert {key for key, value in largest.items() if value < 1e-13} <= shifts
    assert values[1] < values[0]


@pytest.mark.parametrize(
    "name", ["max", "mean", "sparsemax", "entmax15", "entmax_alpha", "concatenation", "mean_p", "msp_sets", "nested"]
)
def test_bf16_autocast_keeps_what_matters_in_fp32(name: str) -> None:
    model = variant_model(name).eval()
    tiles = by_size(variant_tiles(model, 2, 2), Tensor.float)
    with torch.no_grad():
        exact = model(tiles, **asks(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tiles, **asks(model))
    assert {value.dtype for value in tensors(output).values()} == {torch.float32}
    torch.testing.assert_close(output.logit_BK, exact.logit_BK, rtol=0.1, atol=0.05)


def test_the_backbone_is_called_once_per_tile_size() -> None:
    for name, calls in (("single", 1), ("msp", 3), ("nested", 1), ("backbone_pyramid", 1)):
        model, seen = variant_model(name).double().eval(), []
        model.backbone.register_forward_hook(lambda *_args, seen=seen: seen.append(1))
        model(variant_tiles(model, 2, 3))
        assert len(seen) == calls


@pytest.mark.parametrize("name", ["msp", "single", "nested"])
def test_tiles_of_the_wrong_kind_are_refused(name: str) -> None:
    model = double_model(name)
    tiles = variant_tiles(model, 1, 2)
    other = tiles[32] if isinstance(tiles, dict) else {64: tiles}
    with pytest.raises(UserError, match="the model was called on"):
        model(other)


def test_tile_sizes_must_be_those_of_the_model() -> None:
    model = double_model("msp")
    tiles = variant_tiles(model, 1, 2)
    with pytest.raises(UserError, match=r"sizes \[32, 48\].*\[32, 48, 64\]"):
        model({size: part for size, part in tiles.items() if size != 64})
    straight, turned = model(tiles), model(dict(reversed(tiles.items())))
    assert torch.equal(straight.logit_BK, turned.logit_BK)
    assert list(turned.attention) == [32, 48, 64]


@pytest.mark.parametrize("name", ["nested", "msp", "single_sets", "entmax15", "entmax_alpha"])
def test_uniform_attention_reaches_every_pooling(name: str) -> None:
    model = double_model(name)
    with torch.no_grad():
        output = model(variant_tiles(model, 2, 3), uniform_mix=1.0)
    for weight in (*output.attention.values(), *(output.inner_attention or {}).values()):
        torch.testing.assert_close(weight, torch.full_like(weight, 1 / weight.shape[-1]))


@pytest.mark.parametrize("name", ["nested", "nested_region_attention", "concatenation", "mean_p", "msp", "single"])
def test_labels_have_parameters_of_their_own(name: str) -> None:
    """The first label's logit leaves the second label's attentions and heads alone."""
    model = variant_model(name, probability="softmax").double().eval()
    model(variant_tiles(model, 2, 2)).logit_BK[:, 0].sum().backward()
    own = {key: p.grad for key, p in model.named_parameters() if key.split(".")[-2] in ("score", "head", "classifier")}
    used = {key: gradient for key, gradient in own.items() if gradient is not None}
    assert used
    for key, gradient in used.items():
        assert (gradient[1] == 0).all(), key
        assert gradient[0].abs().sum() > 0 or key.endswith("score.bias"), key


def test_uniform_attention_of_max_pooling_is_refused() -> None:
    model = double_model("max")
    with pytest.raises(UserError, match="uniform_attention_share: 0"):
        model(variant_tiles(model, 1, 2), uniform_mix=0.5)


def test_instance_logits_of_nested_mil_are_refused() -> None:
    model = double_model("nested")
    with pytest.raises(UserError, match="nested: false"):
        model(variant_tiles(model, 1, 2), instance_logits=True)
