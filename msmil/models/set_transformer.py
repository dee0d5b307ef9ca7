"""Set transformer blocks as FPN-MIL uses them (after Lee et al. 2019).

Legend: B bags, Q queries, I instances (keys), h heads, d width of a head, D width = h d, K labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from msmil.models.attention import LabelLinear, attention_weight, masked_score
from msmil.models.pooling import Pooled, Pooling
from msmil.models.probability import Probability, ProbabilityMap


class MAB(nn.Module):
    """Multi-head attention block.

    q, k, v = fc_q(Q), fc_k(X), fc_v(X);  A = softmax(q_h k_h^T / sqrt(D)), with the whole width D, not the head's;
    O = LN0(concat_h(q_h + A_h v_h)), so that the residual is the projected query;  out = LN1(O + relu(fc_o(O))).
    """

    def __init__(self, *, query_dim: int, key_dim: int, dim: int, heads: int, layer_norm: bool) -> None:
        super().__init__()
        assert dim % heads == 0
        self.heads = heads
        self.scale = 1.0 / math.sqrt(dim)
        self.fc_q = nn.Linear(query_dim, dim)
        self.fc_k = nn.Linear(key_dim, dim)
        self.fc_v = nn.Linear(key_dim, dim)
        self.fc_o = nn.Linear(dim, dim)
        self.ln0 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.ln1 = nn.LayerNorm(dim) if layer_norm else nn.Identity()

    def forward(self, query_BQD: Tensor, key_BID: Tensor, mask_BI: Tensor | None = None) -> Tensor:
        """[B, Q, D]; keys where `mask_BI` is False get no weight. The Q x I weights are never stored."""
        q_BQD = self.fc_q(query_BQD)
        mask_B11I = None if mask_BI is None else mask_BI[:, None, None, :]
        attended_BhQd = functional.scaled_dot_product_attention(
            self.split(q_BQD),
            self.split(self.fc_k(key_BID)),
            self.split(self.fc_v(key_BID)),
            attn_mask=mask_B11I,
            scale=self.scale,
        )
        return self.finish(q_BQD + self.merge(attended_BhQd))

    def split(self, x_BQD: Tensor) -> Tensor:
        """[B, Q, D] -> [B, h, Q, d]."""
        return x_BQD.reshape(*x_BQD.shape[:2], self.heads, -1).transpose(1, 2)

    def merge(self, x_BhQd: Tensor) -> Tensor:
        """[B, h, Q, d] -> [B, Q, D]."""
        return x_BhQd.transpose(1, 2).flatten(-2)

    def finish(self, o_XD: Tensor) -> Tensor:
        """The part after the attention: norms and the residual layer."""
        o_XD = self.ln0(o_XD)
        return self.ln1(o_XD + functional.relu(self.fc_o(o_XD)))  # type: ignore[no-any-return]


class SAB(nn.Module):
    """Self-attention of a set: MAB(X, X)."""

    def __init__(self, *, in_dim: int, dim: int, heads: int, layer_norm: bool) -> None:
        super().__init__()
        self.mab = MAB(query_dim=in_dim, key_dim=in_dim, dim=dim, heads=heads, layer_norm=layer_norm)

    def forward(self, x_BID: Tensor, mask_BI: Tensor | None = None) -> Tensor:
        """[B, I, in_dim] -> [B, I, D]; padded instances influence no other."""
        return self.mab(x_BID, x_BID, mask_BI)  # type: ignore[no-any-return]


class ISAB(nn.Module):
    """Self-attention through m inducing points: MAB(X, MAB(I, X))."""

    def __init__(self, *, in_dim: int, dim: int, heads: int, layer_norm: bool, points: int) -> None:
        super().__init__()
        self.inducing_1MD = nn.Parameter(torch.empty(1, points, dim))
        nn.init.xavier_uniform_(self.inducing_1MD)
        self.mab0 = MAB(query_dim=dim, key_dim=in_dim, dim=dim, heads=heads, layer_norm=layer_norm)
        self.mab1 = MAB(query_dim=in_dim, key_dim=dim, dim=dim, heads=heads, layer_norm=layer_norm)

    def forward(self, x_BID: Tensor, mask_BI: Tensor | None = None) -> Tensor:
        """[B, I, in_dim] -> [B, I, D]; padded instances influence no other."""
        inducing_BMD = self.inducing_1MD.expand(x_BID.shape[0], -1, -1)
        return self.mab1(x_BID, self.mab0(inducing_BMD, x_BID, mask_BI))  # type: ignore[no-any-return]


class PMA(Pooling):
    """Pooling by attention: MAB(S, Z) with one seed per label; the labels share the projections.

    With several heads, weight and score are means over the heads. `probability` maps the scores to weights.
    """

    def __init__(
        self, *, dim: int, heads: int, layer_norm: bool, labels: int, probability: Probability = "softmax"
    ) -> None:
        super().__init__()
        self.probability = ProbabilityMap(probability)
        self.seed_1KD = nn.Parameter(torch.empty(1, labels, dim))
        for k in range(labels):  # xavier's bound depends on the shape: give each seed that of a single one
            nn.init.xavier_uniform_(self.seed_1KD[:, k : k + 1])
        self.mab = MAB(query_dim=dim, key_dim=dim, dim=dim, heads=heads, layer_norm=layer_norm)

    def forward(self, z_BID: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool each bag. `mask_BI` is True for real instances; for `uniform_mix` see `attention_weight`."""
        mab = self.mab
        q_1KD = mab.fc_q(self.seed_1KD)
        k_BhId, v_BhId = mab.split(mab.fc_k(z_BID)), mab.split(mab.fc_v(z_BID))
        score_BhKI = masked_score(mab.split(q_1KD) @ k_BhId.transpose(-2, -1) * mab.scale, mask_BI)
        weight_BhKI = attention_weight(score_BhKI, mask_BI, uniform_mix, self.probability)
        embedding_BKD = mab.finish(q_1KD + mab.merge(weight_BhKI.to(v_BhId.dtype) @ v_BhId))
        return Pooled(embedding_BKD, weight_BhKI.mean(1), score_BhKI.mean(1))

    def instance_logit(self, z_BID: Tensor, head: LabelLinear) -> Tensor:
        """The head on bags of one instance each, where the only key has weight 1: [B, K, I]."""
        q_1KD = self.mab.fc_q(self.seed_1KD)
        o_BIKD = q_1KD[:, None] + self.mab.fc_v(z_BID)[:, :, None]
        return head.own(self.mab.finish(o_BIKD)).transpose(1, 2)
