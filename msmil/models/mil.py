"""Multi-scale attention MIL: bags of tiles -> logits, attention, scale weights.

Legend: B bags, N tiles, M tiles of all bags, C channels, P tile side, I instances of one scale, S scales,
D channels, K labels (1 inside the model where all labels share one attention), T top shares, h w size of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msmil.models.attention import AttentionPooling, LabelLinear, Pooled, ScaleAttention
from msmil.models.backbone import Backbone
from msmil.models.pyramid import FeaturePyramid
from msmil.models.set_transformer import ISAB, PMA, SAB
from msmil.models.top import composite_instances
from msmil.types import BagOutput
from shards.errors import UserError


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


class BranchOutput(NamedTuple):
    """What one scale makes of a bag; without a head there is the pooled bag alone.

    instance_BKI: the head on single instances, -inf where masked; composite_BKT: on composite ones (T shares).
    """

    pooled: Pooled
    logit_BK: Tensor | None
    instance_BKI: Tensor | None
    composite_BKT: Tensor | None


class ScaleBranch(nn.Module):
    """MIL of one scale: instance encoder, pooling per label and, with deep supervision, a head per label."""

    def __init__(
        self, *, encoder: MLPEncoder | SetEncoder, pooling: AttentionPooling | PMA, head: LabelLinear | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.head = head

    def forward(
        self,
        x_BID: Tensor,
        mask_BI: Tensor | None,
        *,
        uniform_mix: float,
        instance_logits: bool,
        composite_shares: Sequence[float],
    ) -> BranchOutput:
        """Pool the bag, and let the head judge it, its single instances and its composite ones."""
        z_BID = self.encoder(x_BID, mask_BI)
        pooled: Pooled = self.pooling(z_BID, mask_BI, uniform_mix)
        if self.head is None:
            return BranchOutput(pooled, None, None, None)
        logit_BK = self.head.own(pooled.embedding_BKD)
        instance_BKI = composite_BKT = None
        if instance_logits:
            instance_BKI = self.pooling.instance_logit(z_BID, self.head).to(logit_BK.dtype)
            if mask_BI is not None:
                instance_BKI = instance_BKI.masked_fill(~mask_BI[:, None], float("-inf"))
        if composite_shares:
            composite_BTD = composite_instances(z_BID, mask_BI, composite_shares)
            composite_BKT = self.pooling.instance_logit(composite_BTD, self.head).to(logit_BK.dtype)
        return BranchOutput(pooled, logit_BK, instance_BKI, composite_BKT)


class MILModel(nn.Module):
    """Backbone -> pyramid -> MIL per scale -> attention over scales -> classifier (FPN-MIL, MICCAI 2025).

    Per scale s and label k an embedding h_sk; side logit w_sk . h_sk + b_sk (deep supervision); merged embedding
    g_k = sum_s b_ks h_sk; logit v_k . g_k + c_k. Remembers nothing: all it computes is in its BagOutput.

    Args:
        branches: the MIL part of each scale, by stride, finest first.
        in_channels: channels of a tile.
        num_labels: labels; the branches have as many attentions, or one that all share.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        pyramid: FeaturePyramid,
        branches: Mapping[int, ScaleBranch],
        scale_attention: ScaleAttention,
        classifier: LabelLinear,
        in_channels: int,
        num_labels: int,
    ) -> None:
        super().__init__()
        assert tuple(branches) == pyramid.scales
        self.backbone = backbone
        self.pyramid = pyramid
        self.branches = nn.ModuleDict({str(scale): branch for scale, branch in branches.items()})
        self.scale_attention = scale_attention
        self.classifier = classifier
        self.in_channels = in_channels
        self.num_labels = num_labels

    @property
    def scales(self) -> tuple[int, ...]:
        """Strides of the scales, ascending."""
        return self.pyramid.scales

    @property
    def levels(self) -> tuple[int, ...]:
        """What `encode` gives: the strides of the backbone's maps."""
        return self.backbone.strides

    @property
    def deep_supervision(self) -> bool:
        """Whether the scales have heads of their own."""
        return all(branch.head is not None for branch in self.branches.values())

    def forward(
        self,
        tiles_BNCPP: Tensor | None,
        mask_BN: Tensor | None = None,
        *,
        levels: Mapping[int, Tensor] | None = None,
        uniform_mix: float = 0.0,
        instance_logits: bool = False,
        composite_shares: Sequence[float] = (),
    ) -> BagOutput:
        """Everything about a batch of bags.

        Args:
            tiles_BNCPP: normalised tiles; one whole image has N = 1 and its own height and width for P x P. None
                where `levels` are given.
            levels: what `encode` made of them before, with tiles apart: {stride: map_BNDhw}.
            mask_BN: True for real tiles. Padded ones are not encoded, get no weight, and have score and
                instance logit -inf, so a padded bag gives what the unpadded one gives.
            uniform_mix: share of uniform attention mixed into every pooling, 0..1.
            instance_logits: also return each scale's head on its single instances.
            composite_shares: also return each scale's head on the composite instances of these top shares.

        Raises:
            UserError: wrong shape, a bag without a real tile, instance logits of a model without scale heads.
        """
        self._check_input(tiles_BNCPP, mask_BN, levels, instance_logits or bool(composite_shares))
        if levels is None:
            assert tiles_BNCPP is not None
            bags_tiles, maps = tuple(tiles_BNCPP.shape[:2]), self.encode(tiles_BNCPP, mask_BN)
        else:
            bags_tiles = tuple(levels[self.backbone.strides[0]].shape[:2])
            maps = {stride: _real(map_BNDhw, mask_BN) for stride, map_BNDhw in levels.items()}
        outputs: dict[int, BranchOutput] = {
            scale: self.branches[str(scale)](
                x_BID,
                mask_BI,
                uniform_mix=uniform_mix,
                instance_logits=instance_logits,
                composite_shares=composite_shares,
            )
            for scale, (x_BID, mask_BI) in self._instances(maps, bags_tiles, mask_BN).items()
        }
        embedding_BSKD = torch.stack([out.pooled.embedding_BKD for out in outputs.values()], dim=1)
        merged_BKD, weight_BKS = self.scale_attention(embedding_BSKD)
        logits = [out.logit_BK for out in outputs.values() if out.logit_BK is not None]
        instance = {s: out.instance_BKI for s, out in outputs.items() if out.instance_BKI is not None}
        composite = {s: out.composite_BKT for s, out in outputs.items() if out.composite_BKT is not None}
        return BagOutput(
            logit_BK=self.classifier.own(merged_BKD),
            scale_logit_SBK=torch.stack(logits) if logits else None,
            attention={s: self._over_labels(out.pooled.weight_BKI) for s, out in outputs.items()},
            score={s: self._over_labels(out.pooled.score_BKI) for s, out in outputs.items()},
            instance_logit=instance or None,
            scale_weight_BKS=self._over_labels(weight_BKS),
            composite_logit=composite or None,
        )

    def encode(self, tiles_BNCPP: Tensor, mask_BN: Tensor | None = None) -> dict[int, Tensor]:
        """The backbone's maps of the real tiles, {stride: map_MDhw}; what else the model does starts from them."""
        return dict(zip(self.backbone.strides, self.backbone(_real(tiles_BNCPP, mask_BN)), strict=True))

    def _instances(
        self, maps: Mapping[int, Tensor], bags_tiles: tuple[int, ...], mask_BN: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """{scale: (instances in the order (tile, y, x), mask)}, zeros for the instances of padded tiles."""
        B, N = bags_tiles
        real_M = None if mask_BN is None else mask_BN.flatten()
        levels = self.pyramid([maps[stride] for stride in self.backbone.strides])
        instances: dict[int, tuple[Tensor, Tensor | None]] = {}
        for scale, map_MDhw in levels.items():
            x_MhwD = map_MDhw.permute(0, 2, 3, 1)
            mask_BI = None
            if real_M is not None and mask_BN is not None:
                every = x_MhwD.new_zeros(B * N, *x_MhwD.shape[1:])
                every[real_M] = x_MhwD
                x_MhwD = every
                mask_BI = mask_BN.repeat_interleave(x_MhwD.shape[1] * x_MhwD.shape[2], dim=1)
            instances[scale] = (x_MhwD.reshape(B, -1, x_MhwD.shape[-1]), mask_BI)
        return instances

    def _over_labels(self, x_BKX: Tensor) -> Tensor:
        return x_BKX.expand(-1, self.num_labels, -1)

    def _check_input(
        self, tiles_BNCPP: Tensor | None, mask_BN: Tensor | None, levels: Mapping[int, Tensor] | None, heads: bool
    ) -> None:
        if levels is not None:
            shape = self._check_levels(levels)
        else:
            shape = () if tiles_BNCPP is None else tuple(tiles_BNCPP.shape)
            if len(shape) != 5 or shape[2] != self.in_channels:
                raise UserError(
                    f"the model was called on tiles of shape {shape}",
                    fix=f"give [bags, tiles, {self.in_channels}, height, width], as model.in_channels says",
                )
        if mask_BN is not None:
            if mask_BN.dtype != torch.bool or tuple(mask_BN.shape) != shape[:2]:
                raise UserError(
                    f"the tile mask has shape {tuple(mask_BN.shape)} and type {mask_BN.dtype}",
                    fix=f"give booleans of shape {list(shape[:2])}, True for real tiles",
                )
            empty = (~mask_BN.any(dim=1)).nonzero().flatten().tolist()
            if empty:
                raise UserError(f"bags {empty} of the batch have no real tile", fix="leave such bags out of the batch")
        if heads and not self.deep_supervision:
            raise UserError(
                "logits of instances were asked of a model that has no heads per scale",
                fix="set model.deep_supervision: true (and train it so), or no loss on instances",
            )

    def _check_levels(self, levels: Mapping[int, Tensor]) -> tuple[int, ...]:
        wanted = dict(zip(self.backbone.strides, self.backbone.channels, strict=True))
        found = {stride: tuple(levels[stride].shape) for stride in wanted if stride in levels}
        if any(len(s) != 5 or s[2] != wanted[stride] for stride, s in found.items()) or len(found) < len(wanted):
            raise UserError(
                f"the model was called on levels of shapes { {s: tuple(x.shape) for s, x in levels.items()} }",
                fix=f"give [bags, tiles, channels, height, width] for the strides and channels {wanted}",
            )
        return next(iter(found.values()))


def _real(x_BNX: Tensor, mask_BN: Tensor | None) -> Tensor:
    """What belongs to real tiles, [M, ...]."""
    x_MX = x_BNX.flatten(0, 1)
    return x_MX if mask_BN is None else x_MX[mask_BN.flatten()]
