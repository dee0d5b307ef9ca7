"""The top of a bag: means over the largest share of instances.

Legend: B bags, I instances of one scale, D channels, T top shares, X any further axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_mean(value_BXI: Tensor, share: float) -> Tensor:
    """Mean of the largest `share` of the real instances' values (at least one): [B, X]. Padding is -inf."""
    real_BXI = ~torch.isneginf(value_BXI)
    most = max(1, round(share * value_BXI.shape[-1]))
    top_BXT = value_BXI.topk(most, dim=-1).values
    count_BX1 = (share * real_BXI.sum(-1, keepdim=True).double()).round().clamp(min=1).long()
    taken_BXT = torch.arange(most, device=value_BXI.device) < count_BX1
    return torch.where(taken_BXT, top_BXT, 0.0).sum(-1) / count_BX1.squeeze(-1)


def composite_instances(z_BID: Tensor, mask_BI: Tensor | None, shares: Sequence[float]) -> Tensor:
    """One instance per share, put together from a bag's: channel d is the mean of z_d over d's own top: [B, T, D].

    Where the top of a logit is one guess at where a lesion is, each channel here makes its own: what any channel
    happens to find can be learned from.
    """
    value_BDI = z_BID.transpose(1, 2)
    if mask_BI is not None:
        value_BDI = value_BDI.masked_fill(~mask_BI[:, None], float("-inf"))
    return torch.stack([top_mean(value_BDI, share) for share in shares], dim=1)
