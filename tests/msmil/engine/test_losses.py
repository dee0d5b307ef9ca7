from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msmil.config import LossConfig
from msmil.engine.losses import BagLoss, LossParts, auto_pos_weight
from msmil.types import BagOutput
from shards.balance import draw_share, label_classes

SCALES = (8, 16)
WITH_INSTANCES = LossConfig(instance_weight=0.5, composite_weight=0.25, top_fractions=(0.1, 0.5))


def output(bags: int, labels: int = 2, *, seed: int = 0, instances: int = 20) -> BagOutput:
    """Random logits that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return BagOutput(
        logit_BK=random(bags, labels),
        scale_logit_SBK=random(len(SCALES), bags, labels),
        attention={s: torch.full((bags, labels, instances), 1 / instances) for s in SCALES},
        score=None,
        instance_logit={s: random(bags, labels, instances) for s in SCALES},
        scale_weight_BKS=None,
        composite_logit={s: random(bags, labels, len(WITH_INSTANCES.top_fractions)) for s in SCALES},
        scales=SCALES,
    )


def compute(
    out: BagOutput, label_BK: Any, weight_B: Any = None, *, config: LossConfig = WITH_INSTANCES, **kwargs: Any
) -> LossParts:
    label = torch.as_tensor(label_BK, dtype=torch.int8)
    weight = torch.ones(len(label)) if weight_B is None else torch.as_tensor(weight_B, dtype=torch.float32)
    loss = BagLoss(config, kwargs.pop("pos_weight", [1.0] * label.shape[1]))
    return loss(out, label, weight, **{"global_count": label.numel(), **kwargs})


def leaves_of(out: BagOutput) -> list[Tensor]:
    return [out.logit_BK, out.scale_logit_SBK, *out.instance_logit.values(), *out.composite_logit.values()]


def gradients(out: BagOutput) -> list[Tensor]:
    leaves = leaves_of(out)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def bce(logit: float, target: int, pos_weight: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -pos_weight * math.log(p) if target else -math.log(1 - p)


def test_each_head_is_a_weighted_cross_entropy_over_the_global_count() -> None:
    out, label, pos_weight = output(2), [[1, 0], [0, 1]], [3.0, 5.0]
    parts = compute(out, label, config=LossConfig(), pos_weight=pos_weight, global_count=16)

    def plain(logit_BK: Tensor) -> float:
        return sum(bce(float(logit_BK[b, k]), label[b][k], pos_weight[k]) for b in range(2) for k in range(2)) / 16

    assert float(parts.aggregated) == pytest.approx(plain(out.logit_BK.detach()), rel=1e-5)
    assert list(parts.per_scale) == list(SCALES)
    for s, scale in enumerate(SCALES):
        assert float(parts.per_scale[scale]) == pytest.approx(plain(out.scale_logit_SBK[s].detach()), rel=1e-5)
    assert parts.auxiliary == {}
    assert parts.total.item() == pytest.approx(float(parts.aggregated + sum(parts.per_scale.values())), rel=1e-6)


def test_the_instance_loss_is_on_the_mean_of_the_top_instances() -> None:
    out, label = output(2), [[1, 0], [0, 1]]
    config = LossConfig(instance_weight=0.5, top_fractions=(0.1, 0.5))
    parts = compute(out, label, config=config)
    expected = 0.0
    for logit_BKI in out.instance_logit.values():
        for count in (2, 10):  # 10 % and 50 % of 20
            top_BK = logit_BKI.detach().sort(-1, descending=True).values[..., :count].mean(-1)
            expected += sum(bce(float(top_BK[b, k]), label[b][k], 1.0) for b in range(2) for k in range(2)) / 4 / 2
    assert list(parts.auxiliary) == ["instance"]
    assert float(parts.auxiliary["instance"]) == pytest.approx(expected, rel=1e-5)
    without = compute(out, label, config=LossConfig())
    assert parts.total.item() == pytest.approx(without.total.item() + 0.5 * expected, rel=1e-5)


def test_the_composite_loss_is_on_the_heads_of_composite_instances() -> None:
    out, label = output(2), [[1, 0], [0, 1]]
    parts = compute(out, label, config=LossConfig(composite_weight=0.25, top_fractions=(0.1, 0.5)))
    expected = sum(
        bce(logit_BKT[b, k, t].item(), label[b][k], 1.0) / 4 / 2
        for logit_BKT in out.composite_logit.values()
        for b, k, t in itertools.product(range(2), range(2), range(2))
    )
    assert list(parts.auxiliary) == ["composite"]
    assert float(parts.auxiliary["composite"]) == pytest.approx(expected, rel=1e-5)
    without = compute(out, label, config=LossConfig())
    assert parts.total.item() == pytest.approx(without.total.item() + 0.25 * expected, rel=1e-5)


def test_labels_add_up_to_the_total() -> None:
    parts = compute(output(3, labels=2), [[1, 0], [0, -1], [1, 1]])
    assert parts.per_label_K.shape == (2,)
    assert float(parts.per_label_K.sum()) == pytest.approx(parts.total.item(), rel=1e-6)


def test_a_model_without_deep_supervision() -> None:
    out = output(2)
    out.scale_logit_SBK = None
    parts = compute(out, [[1, 0], [0, 1]], config=LossConfig())
    assert parts.per_scale == {}
    assert parts.total.item() == pytest.approx(float(parts.aggregated))


class TestWhatDoesNotCount:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e4])
    def test_padding_adds_exactly_nothing(self, bad: float) -> None:
        """Not even where its logits are not numbers."""
        out, alone = output(2), output(2)
        with torch.no_grad():
            for leaf in (*leaves_of(out)[:1], *out.scale_logit_SBK, *leaves_of(out)[2:]):
                leaf[1] = bad
        parts = compute(out, [[1, 0], [1, 1]], [1.0, 0.0], global_count=4)
        first = compute(_bag(alone, 0), [[1, 0]], global_count=4, config=WITH_INSTANCES)
        assert torch.equal(parts.total, first.total)
        parts.total.backward()
        maps = (*out.instance_logit.values(), *out.composite_logit.values())
        for gradient in (out.logit_BK.grad, *out.scale_logit_SBK.grad, *(logit.grad for logit in maps)):
            assert (gradient[1] == 0).all()
            assert gradient[0].isfinite().all()

    def test_unknown_labels_add_exactly_nothing(self) -> None:
        out = output(2)
        compute(out, [[1, -1], [-1, 0]]).total.backward()
        for gradient in gradients(out):
            by_label = gradient if gradient.shape[0] == 2 and gradient.dim() == 2 else gradient.reshape(-1, 2, 2)
            assert gradient.abs().sum() > 0
            assert by_label.isfinite().all()
        assert (out.logit_BK.grad == 0).tolist() == [[False, True], [True, False]]
        assert (out.scale_logit_SBK.grad == 0).all(0).tolist() == [[False, True], [True, False]]
        for leaf in (*out.instance_logit.values(), *out.composite_logit.values()):
            assert (leaf.grad == 0).all(-1).tolist() == [[False, True], [True, False]]

    def test_a_batch_of_nothing_is_zero(self) -> None:
        out = output(2)
        parts = compute(out, [[-1, -1], [1, 0]], [1.0, 0.0])
        parts.total.backward()
        assert parts.total.item() == 0.0
        assert all((gradient == 0).all() for gradient in gradients(out))

    def test_a_known_label_with_a_logit_that_is_not_a_number_shows(self) -> None:
        out = output(2)
        with torch.no_grad():
            out.instance_logit[8][0, 0, 3] = float("nan")
        assert compute(out, [[1, 0], [0, 1]]).total.isnan()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cut=st.integers(1, 5), labels=st.lists(st.sampled_from([-1, 0, 1]), min_size=12, max_size=12))
def test_shares_of_micro_batches_add_up_to_the_whole_batch(cut: int, labels: list[int]) -> None:
    label_BK = np.array(labels).reshape(6, 2)
    out = output(6)
    whole = compute(out, label_BK, global_count=12).total.item()
    shares = [
        compute(_bag(out, *rows), label_BK[list(rows)], global_count=12).total.item()
        for rows in (range(cut), range(cut, 6))
    ]
    assert sum(shares) == pytest.approx(whole, rel=1e-5, abs=1e-7)


def _bag(out: BagOutput, *rows: int) -> BagOutput:
    index = list(rows)
    return BagOutput(
        logit_BK=out.logit_BK[index],
        scale_logit_SBK=out.scale_logit_SBK[:, index],
        attention={s: a[index] for s, a in out.attention.items()},
        score=None,
        instance_logit={s: logit[index] for s, logit in out.instance_logit.items()},
        scale_weight_BKS=None,
        composite_logit={s: logit[index] for s, logit in out.composite_logit.items()},
        scales=out.scales,
    )


def test_without_a_head_of_its_own_the_aggregated_logit_is_reported_and_not_trained() -> None:
    out, label = output(2), torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    fused, loss = (BagLoss(LossConfig(), [1.0, 1.0], fused_head=fused) for fused in (True, False))
    parts = loss(out, label, torch.ones(2), global_count=4)
    same = fused(out, label, torch.ones(2), global_count=4)
    assert float(parts.aggregated) == float(same.aggregated)
    assert parts.total.item() == pytest.approx(sum(float(part) for part in parts.per_scale.values()), rel=1e-6)
    assert float(parts.per_label_K.sum()) == pytest.approx(parts.total.item(), rel=1e-6)
    parts.total.backward()
    assert out.logit_BK.grad is None or not out.logit_BK.grad.any()


def test_it_is_computed_in_fp32_under_autocast() -> None:
    out = output(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = compute(out, [[1, 0], [0, 1]])
    assert half.total.dtype == torch.float32
    assert half.total.item() == compute(out, [[1, 0], [0, 1]]).total.item()


class TestAutoPosWeight:
    def test_it_is_negatives_over_positives_of_the_known(self) -> None:
        label_NK = np.array([[1, -1], [0, 1], [0, 1], [-1, 0], [0, -1]], dtype=np.int8)
        weight_K, warnings = auto_pos_weight(label_NK, ["Mass", "Asymmetry"])
        assert weight_K.tolist() == [3.0, 0.5]
        assert warnings == []

    def test_images_count_as_often_as_they_are_drawn(self) -> None:
        label_NK = np.array([[1, 0], [0, 1], [0, 0], [0, 0], [0, 0], [-1, -1]], dtype=np.int8)
        share_N = draw_share(label_classes(label_NK, ["Mass", "Calc"]))
        np.testing.assert_allclose(share_N, [1 / 3, 1 / 3, 1 / 9, 1 / 9, 1 / 9, 0])
        weight_K, warnings = auto_pos_weight(label_NK, ["Mass", "Calc"], share_N)
        np.testing.assert_allclose(weight_K, [2, 2])
        assert warnings == []
        one = label_NK[:5, :1]
        assert auto_pos_weight(one, ["Mass"], draw_share(label_classes(one, ["Mass"])))[0] == pytest.approx([1])

    @pytest.mark.parametrize(("positives", "weight"), [(894, 16.90), (337, 46.48)])
    def test_the_ratios_measured_on_the_training_images_of_vindr(self, positives: int, weight: float) -> None:
        label_NK = (np.arange(16000) < positives).astype(np.int8)[:, None]
        assert round(float(auto_pos_weight(label_NK, ["Mass"])[0][0]), 2) == weight

    @pytest.mark.parametrize(("value", "missing"), [(0, "positives"), (1, "negatives")])
    def test_a_label_with_one_kind_has_weight_one_and_a_warning(self, value: int, missing: str) -> None:
        label_NK = np.array([[1, value], [0, value], [0, -1]], dtype=np.int8)
        weight_K, warnings = auto_pos_weight(label_NK, ["Mass", "Nipple_Retraction"])
        assert weight_K.tolist() == [2.0, 1.0]
        assert len(warnings) == 1
        assert f"Nipple_Retraction has no {missing} among its 2 known" in warnings[0]
