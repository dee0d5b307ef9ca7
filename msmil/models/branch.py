"""The MIL part of one scale.

Legend: B bags, I instances of one scale, D channels, K labels (1 inside the model where all labels share one
attention), N tiles, T top shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from msmil.models.attention import LabelLinear
from msmil.models.encoders import Encoder
from msmil.models.instances import Instances
from msmil.models.pooling import Pooled, Pooling
from msmil.models.top import composite_instances


class Asked(NamedTuple):
    """What is asked of a forward pass beside the logits (see `MILModel.forward`)."""

    uniform_mix: float = 0.0
    instance_logits: bool = False
    composite_shares: Sequence[float] = ()


class BranchOutput(NamedTuple):
    """What one scale makes of a bag; without a head there is the pooled bag alone.

    instance_BKI: the head on single instances, -inf where masked; composite_BKT: on composite ones (T shares);
    inner_BKNI: attention inside each region (nested).
    """

    pooled: Pooled
    logit_BK: Tensor | None = None
    instance_BKI: Tensor | None = None
    composite_BKT: Tensor | None = None
    inner_BKNI: Tensor | None = None


class ScaleBranch(nn.Module):
    """MIL of one scale: instance encoder, pooling per label and, with deep supervision, a head per label."""

    def __init__(self, *, encoder: Encoder, pooling: Pooling, head: LabelLinear | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.head = head

    def forward(self, instances: Instances, asked: Asked, head: LabelLinear | None) -> BranchOutput:
        """Pool the bag, and let `head` (the branch's own, or the classifier of a single scale) judge it, its single
        instances and its composite ones."""
        x_BID, mask_BI = instances.bags()
        z_BID = self.encoder(x_BID, mask_BI)
        pooled: Pooled = self.pooling(z_BID, mask_BI, asked.uniform_mix)
        if head is None:
            return BranchOutput(pooled)
        logit_BK = head.own(pooled.embedding_BKD)
        instance_BKI = composite_BKT = None
        if asked.instance_logits:
            instance_BKI = self.pooling.instance_logit(z_BID, head).to(logit_BK.dtype)
            if mask_BI is not None:
                instance_BKI = instance_BKI.masked_fill(~mask_BI[:, None], float("-inf"))
        if asked.composite_shares:
            composite_BTD = composite_instances(z_BID, mask_BI, asked.composite_shares)
            composite_BKT = self.pooling.instance_logit(composite_BTD, head).to(logit_BK.dtype)
        return BranchOutput(pooled, logit_BK, instance_BKI, composite_BKT)
