"""Parts of attention: a unit per label, hidden layers, masked scores and weights.

Legend: B bags, I instances, D channels, K labels (1 where all labels share one attention), X any axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from msmil.models.probability import ProbabilityMap


class LabelLinear(nn.Linear):
    """Dropout, then one linear unit per label: w_k . x + b_k."""

    def __init__(self, dim: int, labels: int, dropout: float = 0.0) -> None:
        super().__init__(dim, labels)
        self.dropout = dropout

    def forward(self, x_XD: Tensor, *, own: bool = False) -> Tensor:
        """Every label's unit on the same vectors: [..., D] -> [..., K]; with `own`, see there."""
        x_XD = functional.dropout(x_XD, self.dropout, self.training)
        return (x_XD * self.weight).sum(-1) + self.bias if own else super().forward(x_XD)

    def own(self, x_XKD: Tensor) -> Tensor:
        """Each label's unit on that label's vector: [..., K or 1, D] -> [..., K]; fp32 also under autocast.

        Called through the module, so that what gathers its weights (ZeRO-3) knows when they are needed.
        """
        logit_XK: Tensor = self(x_XKD, own=True)
        return logit_XK


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


def masked_score(score_BXI: Tensor, mask_BI: Tensor | None) -> Tensor:
    """Scores in at least fp32, -inf where the instance is padding."""
    score_BXI = score_BXI.to(torch.promote_types(score_BXI.dtype, torch.float32))
    if mask_BI is None:
        return score_BXI
    return score_BXI.masked_fill(~_over(mask_BI, score_BXI), float("-inf"))


def attention_weight(
    score_BXI: Tensor, mask_BI: Tensor | None, uniform_mix: float, probability: ProbabilityMap
) -> Tensor:
    """(1 - m) p(score) + m / n over the n real instances, m = `uniform_mix`; in the scores' precision."""
    weight_BXI: Tensor = probability(score_BXI)
    if uniform_mix == 0.0:
        return weight_BXI
    if mask_BI is None:
        return (1.0 - uniform_mix) * weight_BXI + uniform_mix / score_BXI.shape[-1]
    uniform_BI = mask_BI / mask_BI.sum(-1, keepdim=True)
    return (1.0 - uniform_mix) * weight_BXI + uniform_mix * _over(uniform_BI, score_BXI)


def _over(x_BI: Tensor, like_BXI: Tensor) -> Tensor:
    """[B, I] -> [B, 1, ..., I] with as many axes as `like`."""
    return x_BI.reshape(x_BI.shape[0], *(1,) * (like_BXI.dim() - 2), x_BI.shape[1])
