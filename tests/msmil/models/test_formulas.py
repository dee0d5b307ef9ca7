"""Variants against their formulas, computed again in float64 and label by label, image by image, scale by scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msmil.models.mil import MILModel
from msmil.models.pooling import MaxPooling, MeanPooling
from msmil.models.probability import ProbabilityMap
from msmil.models.pyramid import FeaturePyramid
from msmil.models.scales import merge_max_probability, merge_mean_probability
from tests.msmil.models.variants import variant_model, variant_tiles


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- probability maps -------------------------------------------------------------------------------------------


def entmax_by_bisection(score: list[float], alpha: float) -> list[float]:
    """p_i = max(0, (alpha - 1) z_i - tau)^(1 / (alpha - 1)), with the tau that makes them sum to 1."""
    z = [(alpha - 1) * s for s in score]
    low, high = max(z) - 1, max(z)
    for _ in range(200):
        tau = (low + high) / 2
        p = [max(0.0, value - tau) ** (1 / (alpha - 1)) for value in z]
        low, high = (tau, high) if sum(p) > 1 else (low, tau)
    return p


@pytest.mark.parametrize(("kind", "alpha"), [("sparsemax", 2.0), ("entmax15", 1.5), ("entmax_alpha", 1.5)])
def test_sparse_maps_are_entmax(kind: Any, alpha: float) -> None:
    score_BKI = 2 * random(2, 3, 9)
    weight_BKI = ProbabilityMap(kind)(score_BKI)
    for b in range(2):
        for k in range(3):
            expected = torch.tensor(entmax_by_bisection(score_BKI[b, k].tolist(), alpha), dtype=torch.float64)
            torch.testing.assert_close(weight_BKI[b, k], expected, rtol=1e-6, atol=1e-7)
    assert (weight_BKI == 0).any(), "some instances have no weight at all"


@pytest.mark.parametrize("kind", ["softmax", "sparsemax", "entmax15", "entmax_alpha"])
def test_masked_scores_have_no_weight_and_no_gradient(kind: Any) -> None:
    score_I = random(1, 1, 6).requires_grad_()
    masked = score_I.masked_fill(torch.tensor([False, True, False, False, True, False]), float("-inf"))
    module = ProbabilityMap(kind)
    weight = module(masked)
    assert weight[0, 0, [1, 4]].tolist() == [0, 0]
    assert weight.sum().item() == pytest.approx(1, abs=1e-6)
    (weight * random(6, seed=2)).sum().backward()
    assert score_I.grad.isfinite().all()
    assert score_I.grad[0, 0, [1, 4]].tolist() == [0, 0]
    assert all(p.grad.isfinite() for p in module.parameters())


def test_alpha_is_learned_and_stays_above_one() -> None:
    module = ProbabilityMap("entmax_alpha")
    assert float(module.alpha) == pytest.approx(1.5)
    with torch.no_grad():
        module.raw_alpha.fill_(-100.0)
    assert float(module.alpha) > 1
    weight = module(random(1, 1, 50).float())
    torch.testing.assert_close(weight, torch.softmax(random(1, 1, 50).float(), -1), atol=0.02, rtol=0)


def test_the_weights_of_many_instances_sum_to_one_in_fp32() -> None:
    score = random(1, 2, 46080).float() * 0.01
    for kind in ("sparsemax", "entmax15", "entmax_alpha"):
        assert ProbabilityMap(kind)(score).sum(-1).flatten().tolist() == pytest.approx([1, 1], abs=1e-5)


# --- poolings without attention ----------------------------------------------------------------------------------


def test_mean_and_max_are_those_of_the_real_instances() -> None:
    z_BID, mask_BI = random(2, 5, 3), torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    mean, largest = MeanPooling()(z_BID, mask_BI, 0.0), MaxPooling()(z_BID, mask_BI, 0.0)
    for b in range(2):
        real_ID = z_BID[b, mask_BI[b]]
        torch.testing.assert_close(mean.embedding_BKD[b, 0], real_ID.mean(0))
        assert torch.equal(largest.embedding_BKD[b, 0], real_ID.max(0).values)
    assert mean.weight_BKI is largest.weight_BKI is mean.score_BKI is largest.score_BKI is None


# --- pyramids ------------------------------------------------------------------------------------------------------


def conv(module: Any, x: Tensor) -> Tensor:
    return functional.conv2d(x, module.weight, module.bias, padding=module.kernel_size[0] // 2)


def group_norm(pyramid: FeaturePyramid, x_MDhw: Tensor) -> Tensor:
    """One group: mean and variance over all channels and pixels of an image."""
    flat = x_MDhw.flatten(1)
    mean, variance = flat.mean(1), flat.var(1, unbiased=False)
    scaled = (x_MDhw - mean[:, None, None, None]) / (variance + 1e-5).sqrt()[:, None, None, None]
    return scaled * pyramid.norm.weight[:, None, None] + pyramid.norm.bias[:, None, None]


def two_maps() -> list[Tensor]:
    return [random(2, 3, 8, 6), random(2, 4, 4, 3, seed=1)]


def pyramid(**options: Any) -> FeaturePyramid:
    torch.manual_seed(0)
    return FeaturePyramid(scales=(16, 32, 64), strides=(16, 32), channels=(3, 4), dim=5, **options).double()


def test_the_backbone_pyramid_has_no_top_down_path() -> None:
    module, (fine, coarse) = pyramid(top_down=False), two_maps()
    levels = module.levels([fine, coarse])
    for scale, feature in ((16, fine), (32, coarse)):
        expected = conv(module.refine[str(scale)], conv(module.lateral[str(scale)], feature))
        torch.testing.assert_close(levels[scale], expected)
    assert torch.equal(levels[64], levels[32][:, :, ::2, ::2])


def test_bilinear_upsampling_by_two_takes_three_quarters_of_the_nearer_cell() -> None:
    module, (fine, coarse) = pyramid(upsample="bilinear"), two_maps()
    p32 = conv(module.lateral["32"], coarse)
    padded = functional.pad(p32, (1, 1, 1, 1), mode="replicate")
    tall = torch.stack([0.25 * padded[:, :, :-2] + 0.75 * padded[:, :, 1:-1],
                        0.75 * padded[:, :, 1:-1] + 0.25 * padded[:, :, 2:]], dim=3).flatten(2, 3)  # fmt: skip
    wide = torch.stack([0.25 * tall[..., :-2] + 0.75 * tall[..., 1:-1],
                        0.75 * tall[..., 1:-1] + 0.25 * tall[..., 2:]], dim=4).flatten(3, 4)  # fmt: skip
    expected = conv(module.refine["16"], conv(module.lateral["16"], fine) + wide)
    torch.testing.assert_close(module.levels([fine, coarse])[16], expected)


def test_one_norm_follows_every_convolution() -> None:
    module, (fine, coarse) = pyramid(norm=True), two_maps()
    with torch.no_grad():
        module.norm.weight.copy_(random(5, seed=3))
        module.norm.bias.copy_(random(5, seed=4))
    assert sorted(key for key in module.state_dict() if "norm" in key or "bias" in key) == ["norm.bias", "norm.weight"]
    p32 = group_norm(module, conv(module.lateral["32"], coarse))
    top = p32.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p16 = group_norm(module, conv(module.lateral["16"], fine)) + top
    levels = module.levels([fine, coarse])
    torch.testing.assert_close(levels[32], group_norm(module, conv(module.refine["32"], p32)))
    torch.testing.assert_close(levels[16], group_norm(module, conv(module.refine["16"], p16)))


# --- whole models --------------------------------------------------------------------------------------------------


def linear(module: Any, x: Tensor, k: slice | int = slice(None)) -> Tensor:
    weight = module.weight[k]
    return x @ (weight.T if weight.dim() == 2 else weight) + module.bias[k]


def attend(pooling: Any, z_ID: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gated attention of label k over one set: embedding and weights."""
    hidden = torch.tanh(linear(pooling.hidden.value, z_ID)) * torch.sigmoid(linear(pooling.hidden.gate, z_ID))
    weight_I = torch.softmax(linear(pooling.score, hidden, k), dim=0)
    return weight_I @ z_ID, weight_I


def mlp(encoder: Any, x_ID: Tensor) -> Tensor:
    return linear(encoder.linear, x_ID).clamp(min=0)


def maps_of(model: MILModel, tile_CPP: Tensor) -> dict[int, Tensor]:
    """{scale: instances [I, D] of one tile, row-major}."""
    levels = model.pyramid.levels(model.backbone(tile_CPP[None]))
    return {scale: map_1Dhw[0].flatten(1).T for scale, map_1Dhw in levels.items()}


def test_nested_mil_is_attention_in_each_region_then_over_regions() -> None:
    model = variant_model("nested").double().eval()
    tiles = variant_tiles(model, 2, 3)
    output = model(tiles)
    for b in range(2):
        regions = [maps_of(model, tile) for tile in tiles[b]]
        for s, scale in enumerate(model.scales):
            branch = model.branches[str(scale)]
            for k in range(2):
                pairs = [attend(branch.pooling, mlp(branch.encoder, region[scale]), k) for region in regions]
                encoded_ND = mlp(model.region.encoder, torch.stack([embedding for embedding, _ in pairs]))
                bag_D, weight_N = attend(model.region.pooling, encoded_ND, k)
                torch.testing.assert_close(output.attention[scale][b, k], weight_N)
                torch.testing.assert_close(output.inner_attention[scale][b, k], torch.stack([w for _, w in pairs]))
                torch.testing.assert_close(output.scale_logit_SBK[s, b, k], linear(branch.head, bag_D, k))


@pytest.mark.parametrize("name", ["single", "msp"])
def test_an_instance_of_a_tile_is_the_mean_of_the_last_map(name: str) -> None:
    model = variant_model(name).double().eval()
    tiles = variant_tiles(model, 2, 3)
    output = model(tiles)
    embedding: dict[tuple[int, int], Tensor] = {}
    for scale in model.scales:
        branch = model.branches[str(scale)]
        part = tiles[scale] if name == "msp" else tiles
        for b in range(2):
            x_ND = torch.stack([model.backbone(tile[None])[-1][0].mean((1, 2)) for tile in part[b]])
            for k in range(2):
                embedding[scale, k], weight_N = attend(branch.pooling, mlp(branch.encoder, x_ND), k)
                torch.testing.assert_close(output.attention[scale][b, k], weight_N)
                if name == "single":
                    torch.testing.assert_close(output.logit_BK[b, k], linear(model.classifier, embedding[scale, k], k))
    if name == "msp":  # the last image's scales, merged by gated attention over the three embeddings
        for k in range(2):
            h_SD = torch.stack([embedding[scale, k] for scale in model.scales])
            merged_D, weight_S = attend(model.scale_attention, h_SD, k)
            torch.testing.assert_close(output.scale_weight_BKS[1, k], weight_S)
            torch.testing.assert_close(output.logit_BK[1, k], linear(model.classifier, merged_D, k))


def test_concatenation_is_one_unit_per_label_on_the_scales_in_their_order() -> None:
    model = variant_model("concatenation").double().eval()
    tiles = variant_tiles(model, 2, 2)
    output = model(tiles)
    dim = model.classifier.weight.shape[1] // len(model.scales)
    for b in range(2):
        maps = [maps_of(model, tile) for tile in tiles[b]]
        for k in range(2):
            terms = []
            for s, scale in enumerate(model.scales):
                branch = model.branches[str(scale)]
                h_D, _ = attend(branch.pooling, mlp(branch.encoder, torch.cat([m[scale] for m in maps])), k)
                terms.append(h_D @ model.classifier.weight[k, s * dim : (s + 1) * dim])
            torch.testing.assert_close(output.logit_BK[b, k], sum(terms) + model.classifier.bias[k])
            torch.testing.assert_close(output.scale_weight_BKS[b, k], torch.softmax(torch.stack(terms), 0))


def test_mean_and_max_of_probabilities() -> None:
    logit_SBK = 3 * random(3, 4, 2)
    mean, largest = merge_mean_probability(logit_SBK), merge_max_probability(logit_SBK)
    torch.testing.assert_close(mean.logit_BK.sigmoid(), logit_SBK.sigmoid().mean(0))
    torch.testing.assert_close(largest.logit_BK.sigmoid(), logit_SBK.sigmoid().amax(0))
    assert torch.equal(mean.weight_BKS, torch.full((4, 2, 3), 1 / 3, dtype=torch.float64))
    assert largest.weight_BKS is None


def test_the_mean_of_certain_scales_stays_finite() -> None:
    logit_SBK = torch.tensor([[[200.0]], [[-200.0]], [[200.0]]], requires_grad=True)
    mean = merge_mean_probability(logit_SBK).logit_BK
    assert float(mean) == pytest.approx(0.6931, abs=1e-3)  # two of three: p = 2 / 3
    mean.sum().backward()
    assert logit_SBK.grad.isfinite().all()
