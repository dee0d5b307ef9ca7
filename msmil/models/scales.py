"""From the embeddings or the logits of the scales to one logit per label.

Legend: B bags, S scales, D channels, K labels (1 inside the model where all labels share one embedding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from msmil.models.attention import GatedHidden, LabelLinear, TanhHidden


class Merged(NamedTuple):
    """logit_BK of the bag; weight_BKS: how much each scale counted, sums to 1 over S, None where nothing tells."""

    logit_BK: Tensor
    weight_BKS: Tensor | None


class ScaleAttention(nn.Module):
    """Attention over the scales' embeddings, per label (FPN-MIL, section "Scale aggregation").

    g_k = sum_s b_ks h_sk with b_k = softmax_s(w_k . hidden(h_sk) + c_k).

    Args:
        dim: width of an embedding.
        hidden_dim: width of the hidden layer.
        labels: how many attentions.
        gated: gated hidden layer, or plain.
        dropout: in the hidden layer.
    """

    def __init__(self, *, dim: int, hidden_dim: int, labels: int, dropout: float, gated: bool = True) -> None:
        super().__init__()
        self.hidden = (GatedHidden if gated else TanhHidden)(dim, hidden_dim, dropout)
        self.score = LabelLinear(hidden_dim, labels)

    def forward(self, embedding_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the scales -> merged embedding [B, K, D] and scale weights [B, K, S]."""
        score_BSK = self.score.own(self.hidden(embedding_BSKD))
        score_BSK = score_BSK.to(torch.promote_types(score_BSK.dtype, torch.float32))
        weight_BKS = torch.softmax(score_BSK.transpose(1, 2), dim=-1)
        embedding_BSKD = embedding_BSKD.expand(-1, -1, weight_BKS.shape[1], -1)
        return torch.einsum("bks,bskd->bkd", weight_BKS.to(embedding_BSKD.dtype), embedding_BSKD), weight_BKS


def merge_attention(embedding_BSKD: Tensor, attention: ScaleAttention, classifier: LabelLinear) -> Merged:
    """logit_k = v_k . g_k + c_k on the attention's merged embedding."""
    merged_BKD, weight_BKS = attention(embedding_BSKD)
    return Merged(classifier.own(merged_BKD), weight_BKS)


def merge_concatenation(embedding_BSKD: Tensor, classifier: LabelLinear) -> Merged:
    """logit_k = sum_s V_ks . h_sk + c_k, and the weights softmax_s(V_ks . h_sk) of its terms.

    `classifier` is one unit per label on the S embeddings behind one another (FPN-MIL's weights of this aggregator).
    """
    part_SKD = classifier.weight.unflatten(1, (embedding_BSKD.shape[1], -1)).transpose(0, 1)
    term_BSK = (embedding_BSKD * part_SKD).sum(-1)
    weight_BKS = torch.softmax(term_BSK.transpose(1, 2), dim=-1)
    return Merged(classifier.own(embedding_BSKD.transpose(1, 2).flatten(2)), weight_BKS)


def merge_mean_probability(logit_SBK: Tensor) -> Merged:
    """The logit of the mean of the scales' probabilities, every scale with weight 1 / S.

    log(mean p / mean (1 - p)), from the logarithms, so that a certain scale does not overflow.
    """
    yes_BK = torch.logsumexp(functional.logsigmoid(logit_SBK), dim=0)
    no_BK = torch.logsumexp(functional.logsigmoid(-logit_SBK), dim=0)
    scales, bags, labels = logit_SBK.shape
    weight_BKS = torch.full((bags, labels, scales), 1 / scales, dtype=logit_SBK.dtype, device=logit_SBK.device)
    return Merged(yes_BK - no_BK, weight_BKS)


def merge_max_probability(logit_SBK: Tensor) -> Merged:
    """The logit of the largest of the scales' probabilities."""
    return Merged(logit_SBK.amax(0), None)
