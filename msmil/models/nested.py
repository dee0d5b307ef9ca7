"""Nested MIL: the instances of a region make its embedding, the regions make the bag's; a region is a tile.

Legend: B bags, N regions, I instances of a region, D channels, K labels, J embeddings of a region (one per label, or 1
that all labels share), L attentions over regions (likewise), X any axes.
"""

from __future__ import annotations

from torch import Tensor, nn

from msmil.models.branch import Asked, BranchOutput, ScaleBranch
from msmil.models.encoders import Encoder
from msmil.models.instances import Instances
from msmil.models.pooling import Pooled, Pooling


class RegionMIL(nn.Module):
    """Encoder and pooling over the regions of a bag, shared by all scales (FPN-MIL, nested model)."""

    def __init__(self, *, encoder: Encoder, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(self, region_BNJD: Tensor, mask_BN: Tensor | None, uniform_mix: float) -> Pooled:
        """Pool the regions of each bag. A label that has embeddings of its own is a bag of its own."""
        labels = region_BNJD.shape[2]
        region_XND = region_BNJD.transpose(1, 2).flatten(0, 1)
        mask_XN = None if mask_BN is None else mask_BN.repeat_interleave(labels, dim=0)
        pooled: Pooled = self.pooling(self.encoder(region_XND, mask_XN), mask_XN, uniform_mix)
        embedding, weight, score = pooled
        return Pooled(
            _own(embedding, labels),
            None if weight is None else _own(weight, labels),
            None if score is None else _own(score, labels),
        )


def nested_forward(branch: ScaleBranch, region: RegionMIL, instances: Instances, asked: Asked) -> BranchOutput:
    """Pool each region of a scale, all of them at once, then the regions; the head judges the bag.

    The output's weights and scores are over regions, `inner_BKNI` sums to 1 over each real region's instances. Padded
    regions are zeros: they are pooled too, and the mask keeps them out of the bag.
    """
    x_BNID, mask_BN = instances
    bags, tiles = x_BNID.shape[:2]
    inner: Pooled = branch.pooling(branch.encoder(x_BNID.flatten(0, 1), None), None, asked.uniform_mix)
    pooled = region(inner.embedding_BKD.unflatten(0, (bags, tiles)), mask_BN, asked.uniform_mix)
    inner_BKNI = None
    if inner.weight_BKI is not None:
        inner_BKNI = inner.weight_BKI.unflatten(0, (bags, tiles)).transpose(1, 2)
        if mask_BN is not None:
            inner_BKNI = inner_BKNI * mask_BN[:, None, :, None]
    logit_BK = None if branch.head is None else branch.head.own(pooled.embedding_BKD)
    return BranchOutput(pooled, logit_BK, inner_BKNI=inner_BKNI)


def _own(x_BjLX: Tensor, labels: int) -> Tensor:
    """[B * J, L, X] -> [B, K, X]: each label's attention over its own embeddings."""
    x_BJLX: Tensor = x_BjLX.unflatten(0, (-1, labels))
    if x_BJLX.shape[1] == 1:
        return x_BJLX[:, 0]
    if x_BJLX.shape[2] == 1:
        return x_BJLX[:, :, 0]
    return x_BJLX.diagonal(dim1=1, dim2=2).movedim(-1, 1)
