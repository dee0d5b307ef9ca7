"""Encoders of the instances of a bag.

Legend: B bags, I instances, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msmil.models.set_transformer import ISAB, SAB


class MLPEncoder(nn.Module):
    """Instance encoder Dropout(relu(W x + b))."""

    def __init__(self, *, in_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BID: Tensor, mask_BI: Tensor | None = None) -> Tensor:
        """[B, I, in_dim] -> [B, I, D]; instances do not see each other, so the mask has nothing to do."""
        return self.dropout(torch.relu(self.linear(x_BID)))  # type: ignore[no-any-return]


class SetEncoder(nn.Module):
    """Instance encoder of SAB or ISAB blocks."""

    def __init__(self, blocks: list[SAB] | list[ISAB]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BID: Tensor, mask_BI: Tensor | None = None) -> Tensor:
        """[B, I, in_dim] -> [B, I, D]."""
        for block in self.blocks:
            x_BID = block(x_BID, mask_BI)
        return x_BID


Encoder = MLPEncoder | SetEncoder
