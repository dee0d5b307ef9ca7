from __future__ import annotations

import pytest
import torch

from msmil.models.attention import LabelLinear, attention_weight, masked_score
from msmil.models.pooling import AttentionPooling
from msmil.models.probability import ProbabilityMap
from msmil.models.scales import ScaleAttention

SOFTMAX = ProbabilityMap("softmax")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooling(*, gated: bool, labels: int = 2, dropout: float = 0.0) -> AttentionPooling:
    torch.manual_seed(0)
    return AttentionPooling(dim=5, hidden_dim=4, labels=labels, gated=gated, dropout=dropout).double()


MASK_BI = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])


class TestPooling:
    @pytest.mark.parametrize("gated", [True, False])
    def test_the_formula(self, gated: bool) -> None:
        module, z_BID = pooling(gated=gated), random(2, 7, 5)
        pooled = module(z_BID, None, 0.0)
        hidden = torch.tanh(z_BID @ module.hidden.value.weight.T + module.hidden.value.bias)
        if gated:
            hidden = hidden * torch.sigmoid(z_BID @ module.hidden.gate.weight.T + module.hidden.gate.bias)
        for k in range(2):
            score_BI = hidden @ module.score.weight[k] + module.score.bias[k]
            weight_BI = score_BI.exp() / score_BI.exp().sum(1, keepdim=True)
            torch.testing.assert_close(pooled.score_BKI[:, k], score_BI)
            torch.testing.assert_close(pooled.weight_BKI[:, k], weight_BI)
            torch.testing.assert_close(pooled.embedding_BKD[:, k], (weight_BI[:, :, None] * z_BID).sum(1))

    def test_masked_instances_have_no_weight_and_the_worst_score(self) -> None:
        pooled = pooling(gated=True)(random(2, 5, 5), MASK_BI, 0.0)
        masked = ~MASK_BI[:, None].expand(-1, 2, -1)
        assert (pooled.weight_BKI[masked] == 0).all()
        assert torch.isneginf(pooled.score_BKI[masked]).all()
        torch.testing.assert_close(pooled.weight_BKI.sum(-1), torch.ones(2, 2, dtype=torch.float64))

    def test_instance_logit_is_the_head_on_a_bag_of_one(self) -> None:
        module, z_BID = pooling(gated=True), random(2, 7, 5)
        head = LabelLinear(5, 2).double()
        one_by_one = [head.own(module(z_BID[:, i : i + 1], None, 0.0).embedding_BKD) for i in range(7)]
        torch.testing.assert_close(module.instance_logit(z_BID, head), torch.stack(one_by_one, dim=-1))

    def test_dropout_is_after_tanh_and_after_sigmoid(self) -> None:
        module = pooling(gated=True, dropout=0.5).train()
        kept = (module.hidden(torch.ones(1, 4000, 5, dtype=torch.float64)) != 0).double().mean()
        assert 0.22 < kept < 0.28


class TestWeights:
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_uniform_attention_is_mixed_in_over_real_instances(self, share: float) -> None:
        score_BKI = masked_score(random(2, 3, 5), MASK_BI)
        weight_BKI = attention_weight(score_BKI, MASK_BI, share, SOFTMAX)
        softmax_BKI = torch.softmax(score_BKI, -1)
        uniform_BI = MASK_BI.double() / torch.tensor([[3.0], [4.0]])
        torch.testing.assert_close(weight_BKI, (1 - share) * softmax_BKI + share * uniform_BI[:, None])
        torch.testing.assert_close(weight_BKI.sum(-1), torch.ones(2, 3, dtype=torch.float64))

    def test_mixing_without_a_mask_is_mixing_with_all_real(self) -> None:
        score_BKI, every_BI = random(2, 3, 5), torch.ones(2, 5, dtype=torch.bool)
        torch.testing.assert_close(
            attention_weight(score_BKI, None, 0.4, SOFTMAX), attention_weight(score_BKI, every_BI, 0.4, SOFTMAX)
        )

    def test_softmax_is_fp32_under_autocast(self) -> None:
        module = AttentionPooling(dim=8, hidden_dim=4, labels=1, gated=True, dropout=0.0)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = module(torch.randn(1, 1000, 8), None, 0.0)
        assert pooled.weight_BKI.dtype == pooled.score_BKI.dtype == torch.float32
        assert abs(float(pooled.weight_BKI.sum()) - 1) < 1e-5


class TestScaleAttention:
    def test_each_label_weighs_its_own_embeddings(self) -> None:
        torch.manual_seed(0)
        module = ScaleAttention(dim=5, hidden_dim=4, labels=2, dropout=0.0).double()
        h_BSKD = random(3, 4, 2, 5)
        merged_BKD, weight_BKS = module(h_BSKD)
        for k in range(2):
            score_BS = module.hidden(h_BSKD[:, :, k]) @ module.score.weight[k] + module.score.bias[k]
            torch.testing.assert_close(weight_BKS[:, k], torch.softmax(score_BS, -1))
            torch.testing.assert_close(merged_BKD[:, k], (weight_BKS[:, k, :, None] * h_BSKD[:, :, k]).sum(1))


class TestLabelLinear:
    def test_own_is_the_diagonal_of_every(self) -> None:
        head, x_BKD = LabelLinear(5, 3).double(), random(2, 3, 5)
        torch.testing.assert_close(head.own(x_BKD), torch.diagonal(head(x_BKD), dim1=1, dim2=2))

    def test_one_embedding_serves_all_labels(self) -> None:
        head, x_B1D = LabelLinear(5, 3).double(), random(2, 1, 5)
        torch.testing.assert_close(head.own(x_B1D), head(x_B1D)[:, 0])

    def test_own_stays_fp32_under_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert LabelLinear(5, 3).own(torch.randn(2, 3, 5).bfloat16()).dtype == torch.float32

    @torch.no_grad()
    def test_dropout_comes_before_the_unit(self) -> None:
        head = LabelLinear(400, 1, dropout=0.5)
        torch.nn.init.ones_(head.weight)
        torch.nn.init.zeros_(head.bias)
        for logit in (head(torch.ones(1, 400)), head.own(torch.ones(1, 1, 400))):
            assert 250 < float(logit) < 550
            assert float(logit) != 400
        assert float(head.eval()(torch.ones(1, 400))) == 400
