"""Maps from scores to weights that sum to 1.

Legend: X any axes, I instances, last.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import entmax
import torch
from torch import Tensor, nn

Probability = Literal["softmax", "sparsemax", "entmax15", "entmax_alpha"]

_LEAST_ALPHA: Final = 1.01  # at 1 the map is softmax, and its formula divides by alpha - 1
_FIRST_ALPHA: Final = 1.5


class ProbabilityMap(nn.Module):
    """Scores -> weights over the last axis, by alpha-entmax (Peters et al. 2019) or one of its members.

    alpha-entmax(z) = argmax_p p . z + H_alpha(p); softmax is alpha = 1, sparsemax alpha = 2. With alpha > 1 scores far
    below the largest get weight 0 exactly. A score of -inf gets weight 0 always.

    `entmax_alpha` learns its alpha, which starts at 1.5 and stays above 1: alpha = 1.01 + softplus(raw_alpha).
    """

    def __init__(self, kind: Probability) -> None:
        super().__init__()
        self.kind = kind
        if kind == "entmax_alpha":
            raw = math.log(math.expm1(_FIRST_ALPHA - _LEAST_ALPHA))
            self.raw_alpha = nn.Parameter(torch.tensor(raw))

    @property
    def alpha(self) -> Tensor:
        """The learned alpha of `entmax_alpha`."""
        return _LEAST_ALPHA + nn.functional.softplus(self.raw_alpha)

    def forward(self, score_XI: Tensor) -> Tensor:
        """Weights in the scores' precision; the sparse maps compute in float64, since they sum sorted scores."""
        if self.kind == "softmax":
            return torch.softmax(score_XI, dim=-1)
        exact_XI = score_XI.double()
        if self.kind == "sparsemax":
            weight_XI = entmax.sparsemax(exact_XI, dim=-1)
        elif self.kind == "entmax15":
            weight_XI = entmax.entmax15(exact_XI, dim=-1)
        else:
            weight_XI = entmax.entmax_bisect(exact_XI, self.alpha.double(), dim=-1)
        return weight_XI.to(score_XI.dtype)  # type: ignore[no-any-return]
