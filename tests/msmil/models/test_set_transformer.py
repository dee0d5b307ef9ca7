from __future__ import annotations

import math

import pytest
import torch

from msmil.models.attention import LabelLinear
from msmil.models.set_transformer import ISAB, MAB, PMA, SAB


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_mab(mab: MAB, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """One bag [Q, D], [I, D], head by head, straight from the formula."""
    q, k, v = mab.fc_q(query), mab.fc_k(key), mab.fc_v(key)
    width = q.shape[1] // mab.heads
    heads = []
    for h in range(mab.heads):
        part = slice(h * width, (h + 1) * width)
        weight = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(q.shape[1]), dim=-1)
        heads.append(q[:, part] + weight @ v[:, part])
    o = mab.ln0(torch.cat(heads, dim=1))
    return mab.ln1(o + torch.relu(mab.fc_o(o)))


def mask(bags: int, instances: int, real: int) -> torch.Tensor:
    return (torch.arange(instances) < real).expand(bags, -1)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
class TestFormulas:
    def test_sab(self, heads: int, layer_norm: bool) -> None:
        sab = SAB(in_dim=6, dim=8, heads=heads, layer_norm=layer_norm).double()
        x_BID = random(2, 5, 6)
        torch.testing.assert_close(sab(x_BID), torch.stack([plain_mab(sab.mab, x, x) for x in x_BID]))

    def test_isab(self, heads: int, layer_norm: bool) -> None:
        isab = ISAB(in_dim=6, dim=8, heads=heads, layer_norm=layer_norm, points=3).double()
        x_BID = random(2, 5, 6)
        plain = [plain_mab(isab.mab1, x, plain_mab(isab.mab0, isab.inducing_1MD[0], x)) for x in x_BID]
        torch.testing.assert_close(isab(x_BID), torch.stack(plain))

    def test_pma(self, heads: int, layer_norm: bool) -> None:
        pma = PMA(dim=8, heads=heads, layer_norm=layer_norm, labels=3).double()
        z_BID = random(2, 5, 8)
        pooled = pma(z_BID, None, 0.0)
        plain = torch.stack([plain_mab(pma.mab, pma.seed_1KD[0], z) for z in z_BID])
        torch.testing.assert_close(pooled.embedding_BKD, plain)
        torch.testing.assert_close(pooled.weight_BKI.sum(-1), torch.ones(2, 3, dtype=torch.float64))

    def test_pma_instance_logit_is_the_head_on_a_bag_of_one(self, heads: int, layer_norm: bool) -> None:
        pma = PMA(dim=8, heads=heads, layer_norm=layer_norm, labels=3).double()
        head, z_BID = LabelLinear(8, 3).double(), random(2, 5, 8)
        one_by_one = [head.own(pma(z_BID[:, i : i + 1], None, 0.0).embedding_BKD) for i in range(5)]
        torch.testing.assert_close(pma.instance_logit(z_BID, head), torch.stack(one_by_one, dim=-1))


@pytest.mark.parametrize("block", ["sab", "isab"])
def test_masked_keys_influence_no_real_instance(block: str) -> None:
    module = (
        SAB(in_dim=6, dim=8, heads=2, layer_norm=True)
        if block == "sab"
        else ISAB(in_dim=6, dim=8, heads=2, layer_norm=True, points=3)
    ).double()
    x_BID = random(2, 7, 6)
    torch.testing.assert_close(module(x_BID, mask(2, 7, 4))[:, :4], module(x_BID[:, :4]))


def test_masked_instances_do_not_count_in_pma() -> None:
    pma = PMA(dim=8, heads=2, layer_norm=False, labels=2).double()
    z_BID = random(2, 7, 8)
    padded, bare = pma(z_BID, mask(2, 7, 4), 0.3), pma(z_BID[:, :4], None, 0.3)
    torch.testing.assert_close(padded.embedding_BKD, bare.embedding_BKD)
    torch.testing.assert_close(padded.weight_BKI[..., :4], bare.weight_BKI)
    assert (padded.weight_BKI[..., 4:] == 0).all()
    assert torch.isneginf(padded.score_BKI[..., 4:]).all()


def test_pma_score_is_the_mean_over_heads() -> None:
    pma = PMA(dim=8, heads=2, layer_norm=False, labels=1).double()
    z = random(1, 5, 8)
    q, k = pma.mab.fc_q(pma.seed_1KD[0]), pma.mab.fc_k(z[0])
    heads = [q[:, part] @ k[:, part].T / math.sqrt(8) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(pma(z, None, 0.0).score_BKI[0], (heads[0] + heads[1]) / 2)


@torch.no_grad()
def test_learned_points_start_xavier_uniform() -> None:
    """As the published shapes give it: [1, m, D] has the bound sqrt(6 / (m D + D)), one seed that of m = 1."""
    isab = ISAB(in_dim=64, dim=64, heads=4, layer_norm=False, points=20)
    bound = math.sqrt(6 / (20 * 64 + 64))
    assert 0.95 * bound < float(isab.inducing_1MD.abs().max()) <= bound
    seed_KD = PMA(dim=64, heads=1, layer_norm=False, labels=5).seed_1KD[0]
    bound = math.sqrt(6 / (64 + 64))
    assert all(0.85 * bound < float(seed.abs().max()) <= bound for seed in seed_KD)


def test_no_norm_has_no_parameters() -> None:
    assert not [name for name in SAB(in_dim=6, dim=8, heads=2, layer_norm=False).state_dict() if "ln" in name]
