"""Attention over instances and over scales.

Legend: B bags, I instances, S scales, D channels, K labels (1 where all labels share one attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Pooled(NamedTuple):
    """What a pooling makes of a bag.

    embedding_BKD; weight_BKI: attention, fp32, sums to 1 over I; score_BKI: before the softmax, -inf where masked.
    """

    embedding_BKD: Tensor
    weight_BKI: Tensor
    score_BKI: Tensor


class LabelLinear(nn.Linear):
    """Dropout, then one linear unit per label: w_k . x + b_k."""

    def __init__(self, dim: int, labels: int, dropout: float = 0.0) -> None:
        super().__init__(dim, labels)
        self.dropout = dropout

    def forward(self, x_XD: Tensor) -> Tensor:
        """Every label's unit on the same vectors: [..., D] -> [..., K]."""
        return super().forward(functional.dropout(x_XD, self.dropout, self.training))

    def own(self, x_XKD: Tensor) -> Tensor:
        """Each label's unit on that label's vector: [..., K or 1, D] -> [..., K]; fp32 also under autocast."""
        x_XKD = functional.dropout(x_XKD, self.dropout, self.training)
        return (x_XKD * self.weight).sum(-1) + self.bias


class TanhHidden(nn.Module):
    """Dropout(tanh(V x)): hidden layer of attention pooling (Ilse et al. 2018, eq. 8)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_XD: Tensor) -> Tensor:
        """[..., D] -> [..., hidden]."""
        return self.dropout(torch.tanh(self.value(x_XD)))  # type: ignore[no-any-return]


class GatedHidden(nn.Module):
    """Dropout(tanh(V x)) * Dropout(sigmoid(U x)): hidden layer of gated attention (Ilse et al. 2018, eq. 9)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_XD: Tensor) -> Tensor:
        """[..., D] -> [..., hidden]."""
        return self.dropout(torch.tanh(self.value(x_XD))) * self.dropout(torch.sigmoid(self.gate(x_XD)))  # type: ignore[no-any-return]


class AttentionPooling(nn.Module):
    """h_k = sum_i a_ki z_i with a_k = softmax_i(w_k . hidden(z_i) + b_k); the labels share the hidden layer.

    Args:
        dim: width of an instance.
        hidden_dim: width of the hidden layer.
        labels: how many attentions.
        gated: gated hidden layer, or plain.
        dropout: in the hidden layer.
    """

    def __init__(self, *, dim: int, hidden_dim: int, labels: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.hidden = (GatedHidden if gated else TanhHidden)(dim, hidden_dim, dropout)
        self.score = LabelLinear(hidden_dim, labels)

    def forward(self, z_BID: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool each bag. `mask_BI` is True for real instances; for `uniform_mix` see `attention_weight`."""
        score_BKI = masked_score(self.score(self.hidden(z_BID)).transpose(1, 2), mask_BI)
        weight_BKI = attention_weight(score_BKI, mask_BI, uniform_mix)
        return Pooled(torch.bmm(weight_BKI.to(z_BID.dtype), z_BID), weight_BKI, score_BKI)

    def instance_logit(self, z_BID: Tensor, head: LabelLinear) -> Tensor:
        """The head on bags of one instance each, whose embedding is that instance: [B, K, I]."""
        logit_BIK: Tensor = head(z_BID)
        return logit_BIK.transpose(1, 2)


class ScaleAttention(nn.Module):
    """Gated attention over the scales' embeddings, per label (FPN-MIL, section "Scale aggregation").

    g_k = sum_s b_ks h_sk with b_k = softmax_s(w_k . hidden(h_sk) + c_k).
    """

    def __init__(self, *, dim: int, hidden_dim: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.hidden = GatedHidden(dim, hidden_dim, dropout)
        self.score = LabelLinear(hidden_dim, labels)

    def forward(self, embedding_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the scales -> merged embedding [B, K, D] and scale weights [B, K, S]."""
        score_BSK = self.score.own(self.hidden(embedding_BSKD))
        weight_BKS = attention_weight(score_BSK.transpose(1, 2), None, 0.0)
        return torch.einsum("bks,bskd->bkd", weight_BKS.to(embedding_BSKD.dtype), embedding_BSKD), weight_BKS


def masked_score(score_BXI: Tensor, mask_BI: Tensor | None) -> Tensor:
    """Scores in at least fp32, -inf where the instance is padding."""
    score_BXI = score_BXI.to(torch.promote_types(score_BXI.dtype, torch.float32))
    if mask_BI is None:
        return score_BXI
    return score_BXI.masked_fill(~_over(mask_BI, score_BXI), float("-inf"))


def attention_weight(score_BXI: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Tensor:
    """(1 - m) softmax(score) + m / n over the n real instances, m = `uniform_mix`; in the scores' precision."""
    weight_BXI = torch.softmax(score_BXI, dim=-1)
    if uniform_mix == 0.0:
        return weight_BXI
    if mask_BI is None:
        return (1.0 - uniform_mix) * weight_BXI + uniform_mix / score_BXI.shape[-1]
    uniform_BI = mask_BI / mask_BI.sum(-1, keepdim=True)
    return (1.0 - uniform_mix) * weight_BXI + uniform_mix * _over(uniform_BI, score_BXI)


def _over(x_BI: Tensor, like_BXI: Tensor) -> Tensor:
    """[B, I] -> [B, 1, ..., I] with as many axes as `like`."""
    return x_BI.reshape(x_BI.shape[0], *(1,) * (like_BXI.dim() - 2), x_BI.shape[1])
