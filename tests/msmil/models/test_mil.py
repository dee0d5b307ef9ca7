from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msmil.models.backbone import freeze_statistics
from msmil.models.mil import MILModel
from msmil.types import BagOutput
from shards.errors import UserError
from tests.msmil.models.small import SMALL_BACKBONE, random_tiles, small_model

VARIANTS = [  # every encoder with every pooling, and each of them with both kinds of attention
    {"mil_encoder": encoder, "pooling": pooling, "attention": attention}
    for (encoder, pooling), attention in zip(
        itertools.product(("mlp", "sab", "isab"), ("attention", "gated_attention", "pma")),
        itertools.cycle(("per_label", "shared")),
        strict=False,
    )
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))


def double_model(**changes: Any) -> MILModel:
    return small_model(**changes).double().eval()


def tensors(output: BagOutput) -> dict[str, Tensor]:
    """All that a model returns, flat."""
    flat: dict[str, Tensor] = {}
    for name in (field.name for field in fields(output)):
        value = getattr(output, name)
        flat |= {f"{name}/{s}": v for s, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


@every_variant
@pytest.mark.parametrize(("tiles", "hw"), [(3, (64, 64)), (1, (192, 128))], ids=["tiles", "image"])
def test_shapes(variant: dict[str, str], tiles: int, hw: tuple[int, int]) -> None:
    output = small_model(labels=3, **variant).eval()(
        random_tiles(2, tiles, hw=hw), instance_logits=True, composite_shares=(0.02, 0.1)
    )
    instances = {s: tiles * (hw[0] // s) * (hw[1] // s) for s in (16, 32, 64)}
    shapes = {name: tuple(value.shape) for name, value in tensors(output).items()}
    assert shapes == {
        "logit_BK": (2, 3),
        "scale_logit_SBK": (3, 2, 3),
        "scale_weight_BKS": (2, 3, 3),
        **{f"{name}/{s}": (2, 3, i) for name in ("attention", "score", "instance_logit") for s, i in instances.items()},
        **{f"composite_logit/{s}": (2, 3, 2) for s in instances},
    }
    for weight in (*output.attention.values(), output.scale_weight_BKS):
        torch.testing.assert_close(weight.sum(-1), torch.ones(2, 3))


@every_variant
@settings(max_examples=5, deadline=None, derandomize=True)
@given(real=st.lists(st.integers(1, 3), min_size=1, max_size=3), uniform_mix=st.sampled_from([0.0, 0.4]))
def test_a_padded_bag_gives_what_the_unpadded_one_gives(
    variant: dict[str, str], real: list[int], uniform_mix: float
) -> None:
    """Also where the padding holds garbage, and wherever in the bag it lies."""
    model = _cached_model(tuple(sorted(variant.items())))
    tiles_BNCPP = random_tiles(len(real), 3).double()
    mask_BN = torch.stack([torch.arange(3).roll(b) < n for b, n in enumerate(real)])
    garbage = torch.where(mask_BN[:, :, None, None, None], tiles_BNCPP, float("nan"))
    with torch.no_grad():
        asked: dict[str, Any] = {"instance_logits": True, "composite_shares": (0.1, 1.0)}
        padded = tensors(model(garbage, mask_BN, uniform_mix=uniform_mix, **asked))
        for b, mask_N in enumerate(mask_BN):
            bag = tiles_BNCPP[b : b + 1, mask_N]
            bare = tensors(model(bag, uniform_mix=uniform_mix, **asked))
            for name, value in bare.items():
                got = padded[name][:, b : b + 1] if name == "scale_logit_SBK" else padded[name][b : b + 1]
                if "/" in name and not name.startswith("composite"):
                    real_I = mask_N.repeat_interleave(got.shape[-1] // 3)
                    filler = 0.0 if name.startswith("attention") else float("-inf")
                    assert (got[..., ~real_I] == filler).all(), name
                    got = got[..., real_I]
                torch.testing.assert_close(got, value, msg=name)


_MODELS: dict[Any, MILModel] = {}


def _cached_model(key: tuple[tuple[str, str], ...]) -> MILModel:
    if key not in _MODELS:
        _MODELS[key] = double_model(**dict(key))
    return _MODELS[key]


@every_variant
def test_the_order_of_tiles_does_not_matter(variant: dict[str, str]) -> None:
    model, tiles_BNCPP, order = double_model(**variant), random_tiles(2, 4).double(), torch.tensor([2, 0, 3, 1])
    straight, permuted = model(tiles_BNCPP), model(tiles_BNCPP[:, order])
    torch.testing.assert_close(permuted.logit_BK, straight.logit_BK)
    torch.testing.assert_close(permuted.scale_weight_BKS, straight.scale_weight_BKS)
    for scale in model.scales:
        by_tile = straight.attention[scale].reshape(2, 2, 4, -1)
        torch.testing.assert_close(permuted.attention[scale], by_tile[:, :, order].flatten(2))


def test_instances_are_ordered_by_tile_then_row_then_column() -> None:
    model, seen = small_model().eval(), {}
    model.pyramid.register_forward_hook(
        lambda pyramid, _inputs, maps: seen.update(zip(pyramid.scales, maps, strict=True))
    )
    model.branches["16"].register_forward_pre_hook(lambda _module, inputs: seen.update(x_BID=inputs[0].bags()[0]))
    model(random_tiles(2, 3, hw=(64, 128)))
    map_MDhw = seen[16]
    for b, n, y, x in itertools.product(range(2), range(3), range(4), range(8)):
        assert torch.equal(seen["x_BID"][b, (n * 4 + y) * 8 + x], map_MDhw[b * 3 + n, :, y, x])


@every_variant
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_gradients_reach_every_parameter(variant: dict[str, str], deep_supervision: bool) -> None:
    options = {**SMALL_BACKBONE["backbone_options"], "zero_init_last": False}  # timm's zeros would stop gradients
    model = small_model(
        **variant, backbone_options=options, deep_supervision=deep_supervision, encoder_layer_norm=True
    ).double()
    freeze_statistics(model)
    output = model(random_tiles(2, 2).double())
    loss = output.logit_BK.square().sum()
    if deep_supervision:
        loss = loss + output.scale_logit_SBK.square().sum()
    loss.backward()
    largest = {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in model.named_parameters()}
    # a constant added to all scores changes no softmax: these biases alone have a gradient of zero
    shifts = {name for name in largest if name.endswith(("score.bias", "fc_k.bias"))}
    assert {name for name, value in largest.items() if value < 1e-13} <= shifts
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("pooling", ["attention", "gated_attention", "pma"])
def test_labels_have_parameters_of_their_own(pooling: str) -> None:
    """The first label's logit leaves the second label's attention, seed, heads and scale attention alone."""
    model = double_model(pooling=pooling)
    output = model(random_tiles(2, 2).double())
    (output.logit_BK[:, 0].sum() + output.scale_logit_SBK[:, :, 0].sum()).backward()
    own = {name: p.grad for name, p in model.named_parameters() if _label_axis(name) is not None}
    assert len(own) >= 3 * 2 + 2 + 2 + 3
    for name, gradient in own.items():
        axis = _label_axis(name)
        assert (gradient.select(axis, 1) == 0).all(), name
        assert gradient.select(axis, 0).abs().sum() > 0 or name.endswith("score.bias"), name


def _label_axis(name: str) -> int | None:
    if name.endswith("seed_1KD"):
        return 1
    return 0 if name.split(".")[-2] in ("score", "head", "classifier") else None


def test_labels_attend_to_different_places_unless_they_share() -> None:
    tiles_BNCPP = random_tiles(1, 2).double()
    per_label, shared = double_model(), double_model(attention="shared")
    for scale in per_label.scales:
        first, second = per_label(tiles_BNCPP).attention[scale][0]
        assert not torch.allclose(first, second)
        first, second = shared(tiles_BNCPP).attention[scale][0]
        assert torch.equal(first, second)
    assert not torch.equal(*shared(tiles_BNCPP).logit_BK[0])


@pytest.mark.parametrize("pooling", ["attention", "gated_attention", "pma"])
def test_with_one_label_sharing_changes_nothing(pooling: str) -> None:
    per_label = small_model(labels=1, pooling=pooling)
    shared = small_model(labels=1, pooling=pooling, attention="shared")
    assert list(per_label.state_dict()) == list(shared.state_dict())
    tiles_BNCPP = random_tiles(2, 2)
    assert torch.equal(per_label.eval()(tiles_BNCPP).logit_BK, shared.eval()(tiles_BNCPP).logit_BK)


def test_uniform_mix_of_one_gives_every_real_instance_the_same_weight() -> None:
    mask_BN = torch.tensor([[True, True, False]])
    output = small_model().eval()(random_tiles(1, 3), mask_BN, uniform_mix=1.0)
    for weight_BKI in output.attention.values():
        real = weight_BKI.shape[-1] // 3 * 2
        torch.testing.assert_close(weight_BKI[..., :real], torch.full((1, 2, real), 1 / real))


def test_deep_supervision_off_has_no_heads() -> None:
    model = small_model(deep_supervision=False)
    assert model(random_tiles(1, 1)).scale_logit_SBK is None
    assert not [name for name, _ in model.named_parameters() if ".head." in name]


def test_instance_logits_only_when_asked_for() -> None:
    output = small_model()(random_tiles(1, 1))
    assert output.instance_logit is None
    assert output.composite_logit is None


@pytest.mark.parametrize("pooling", ["gated_attention", "pma"])
def test_a_composite_instance_is_judged_as_a_single_instance_is(pooling: str) -> None:
    """Of a bag of one instance it is that instance."""
    model = small_model(pooling=pooling, scales=(32,), inducing_points="auto").eval()
    output = model(random_tiles(2, 1, hw=(32, 32)), instance_logits=True, composite_shares=(0.02,))
    torch.testing.assert_close(output.composite_logit[32], output.instance_logit[32])


def test_a_model_remembers_nothing() -> None:
    model = small_model(encoder_dropout=0.5).eval()
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    first = model(random_tiles(2, 2))
    model(random_tiles(2, 2, seed=5))
    again = model(random_tiles(2, 2))
    assert torch.equal(first.logit_BK, again.logit_BK)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before


def test_bf16_autocast_keeps_what_matters_in_fp32() -> None:
    model = small_model().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(random_tiles(2, 2), instance_logits=True)
    assert {value.dtype for value in tensors(output).values()} == {torch.float32}
    exact = model(random_tiles(2, 2))
    torch.testing.assert_close(output.logit_BK, exact.logit_BK, rtol=0.1, atol=0.05)


class TestErrors:
    def test_a_bag_without_a_real_tile(self) -> None:
        mask_BN = torch.tensor([[True, False], [False, False]])
        with pytest.raises(UserError, match=r"bags \[1\] of the batch have no real tile"):
            small_model()(random_tiles(2, 2), mask_BN)

    def test_wrong_channels(self) -> None:
        with pytest.raises(UserError, match=r"shape \(1, 2, 3, 64, 64\).*\[bags, tiles, 1, height, width\]"):
            small_model()(random_tiles(1, 2).expand(-1, -1, 3, -1, -1))

    def test_images_without_a_tile_axis(self) -> None:
        with pytest.raises(UserError, match=r"shape \(2, 1, 64, 64\)"):
            small_model()(random_tiles(2, 1)[:, 0])

    @pytest.mark.parametrize("mask", [torch.ones(1, 2), torch.ones(2, 2, dtype=torch.bool)])
    def test_a_mask_of_another_kind(self, mask: Tensor) -> None:
        with pytest.raises(UserError, match=r"give booleans of shape \[1, 2\]"):
            small_model()(random_tiles(1, 2), mask)

    def test_instance_logits_without_heads(self) -> None:
        with pytest.raises(UserError, match="deep_supervision: true"):
            small_model(deep_supervision=False)(random_tiles(1, 1), instance_logits=True)
