"""From the instances of a bag to its embedding.

Legend: B bags, I instances, D channels, K labels (1 where all labels share one embedding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msmil.models.attention import GatedHidden, LabelLinear, TanhHidden, attention_weight, masked_score
from msmil.models.probability import Probability, ProbabilityMap


class Pooled(NamedTuple):
    """What a pooling makes of a bag.

    embedding_BKD; weight_BKI: attention, at least fp32, sums to 1 over I; score_BKI: before the probability map, -inf
    where masked. A pooling without attention has neither of the last two, and one embedding for all labels.
    """

    embedding_BKD: Tensor
    weight_BKI: Tensor | None
    score_BKI: Tensor | None


class Pooling(nn.Module):
    """What poolings have in common: called as `pooling(z_BID, mask_BI, uniform_mix)`, they return Pooled.

    `mask_BI` is True for real instances; for `uniform_mix` see `attention_weight`.
    """

    def instance_logit(self, z_BID: Tensor, head: LabelLinear) -> Tensor:
        """The head on bags of one instance each, whose embedding is that instance: [B, K, I]."""
        logit_BIK: Tensor = head(z_BID)
        return logit_BIK.transpose(1, 2)


class MeanPooling(Pooling):
    """h = mean_i z_i: uniform weights already, so that `uniform_mix` changes nothing."""

    def forward(self, z_BID: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool each bag."""
        if mask_BI is None:
            return Pooled(z_BID.mean(1, keepdim=True), None, None)
        total_B1D = (z_BID * mask_BI[:, :, None]).sum(1, keepdim=True)
        return Pooled(total_B1D / mask_BI.sum(1)[:, None, None], None, None)


class MaxPooling(Pooling):
    """h_d = max_i z_id."""

    def forward(self, z_BID: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool each bag; there is no weight that a uniform one could be mixed into."""
        assert uniform_mix == 0.0, "refused by the configuration and by the model"
        if mask_BI is not None:
            z_BID = z_BID.masked_fill(~mask_BI[:, :, None], float("-inf"))
        return Pooled(z_BID.amax(1, keepdim=True), None, None)


class AttentionPooling(Pooling):
    """h_k = sum_i a_ki z_i with a_k = p_i(w_k . hidden(z_i) + b_k); the labels share the hidden layer.

    Args:
        dim: width of an instance.
        hidden_dim: width of the hidden layer.
        labels: how many attentions.
        gated: gated hidden layer, or plain.
        dropout: in the hidden layer.
        probability: the map p from scores to weights.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        labels: int,
        gated: bool,
        dropout: float,
        probability: Probability = "softmax",
    ) -> None:
        super().__init__()
        self.hidden = (GatedHidden if gated else TanhHidden)(dim, hidden_dim, dropout)
        self.score = LabelLinear(hidden_dim, labels)
        self.probability = ProbabilityMap(probability)

    def forward(self, z_BID: Tensor, mask_BI: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool each bag."""
        score_BKI = masked_score(self.score(self.hidden(z_BID)).transpose(1, 2), mask_BI)
        weight_BKI = attention_weight(score_BKI, mask_BI, uniform_mix, self.probability)
        return Pooled(torch.bmm(weight_BKI.to(z_BID.dtype), z_BID), weight_BKI, score_BKI)
