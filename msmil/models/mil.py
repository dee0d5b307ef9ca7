"""Multi-scale attention MIL: bags of tiles -> logits, attention, scale weights.

Legend: B bags, N tiles, C channels, P tile side, I instances of one scale, S scales, D channels, K labels (1 inside
the model where all labels share one attention), T top shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from msmil.models.attention import LabelLinear
from msmil.models.backbone import Backbone
from msmil.models.branch import Asked, BranchOutput, ScaleBranch
from msmil.models.instances import Instances, TileMask, Tiles, check_tiles, pooled_instances, pyramid_instances
from msmil.models.nested import RegionMIL, nested_forward
from msmil.models.pooling import MaxPooling
from msmil.models.pyramid import FeaturePyramid
from msmil.models.scales import (
    Merged,
    ScaleAttention,
    merge_attention,
    merge_concatenation,
    merge_max_probability,
    merge_mean_probability,
)
from msmil.types import BagOutput
from shards.errors import UserError

Layout = Literal["pyramid", "sizes", "single"]
Aggregator = Literal["concatenation", "mean_p", "max_p", "attention", "gated_attention"]


class MILModel(nn.Module):
    """Backbone -> instances of each scale -> MIL per scale -> one logit per label (FPN-MIL, MICCAI 2025).

    Per scale s and label k an embedding h_sk; side logit w_sk . h_sk + b_sk (deep supervision); the logit from the
    embeddings or the side logits, as the aggregator says. Remembers nothing: all it computes is in its BagOutput.

    Args:
        backbone: encoder of tiles.
        pyramid: makes the scales of the tiles' maps; None where a scale is a tile size and an instance a tile.
        branches: the MIL part of each scale, by stride or tile size.
        region: pools the regions of nested MIL, else None.
        scale_attention: for the aggregators attention and gated_attention.
        classifier: of the merged embedding; mean_p and max_p have none.
        aggregator: how scales are merged; a single scale is not.
        layout: scales from a pyramid, tiles of several sizes, or tiles of a single size.
        in_channels: channels of a tile.
        num_labels: labels; the branches have as many attentions, or one that all share.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        pyramid: FeaturePyramid | None,
        branches: Mapping[int, ScaleBranch],
        region: RegionMIL | None,
        scale_attention: ScaleAttention | None,
        classifier: LabelLinear | None,
        aggregator: Aggregator,
        layout: Layout,
        in_channels: int,
        num_labels: int,
    ) -> None:
        super().__init__()
        assert (pyramid is not None) == (layout == "pyramid")
        self.backbone = backbone
        self.pyramid = pyramid
        self.branches = nn.ModuleDict({str(scale): branch for scale, branch in branches.items()})
        self.region = region
        self.scale_attention = scale_attention
        self.classifier = classifier
        self.aggregator = aggregator
        self.layout = layout
        self.in_channels = in_channels
        self.num_labels = num_labels

    @property
    def scales(self) -> tuple[int, ...]:
        """Strides of the scales, or tile sizes in pixels, in the order of S."""
        return tuple(int(scale) for scale in self.branches)

    @property
    def judges_instances(self) -> bool:
        """Whether instance and composite logits can be asked for: there is a head that judges a single instance."""
        heads = self.layout == "single" or all(branch.head is not None for branch in self.branches.values())
        return heads and self.region is None

    @property
    def has_attention(self) -> bool:
        """Whether the poolings give weights to instances, or to regions, and so a map."""
        modules = [*self.branches.values(), *([] if self.region is None else [self.region])]
        return any(hasattr(module.pooling, "probability") for module in modules)

    def forward(
        self,
        tiles_BNCPP: Tiles,
        mask_BN: TileMask | None = None,
        *,
        uniform_mix: float = 0.0,
        instance_logits: bool = False,
        composite_shares: Sequence[float] = (),
    ) -> BagOutput:
        """Everything about a batch of bags.

        Args:
            tiles_BNCPP: normalised tiles; one whole image has N = 1 and its own height and width for P x P. A model of
                several tile sizes takes {size: tiles}.
            mask_BN: True for real tiles (by size, where the tiles are). Padded ones are not encoded, get no weight, and
                have score and instance logit -inf, so a padded bag gives what the unpadded one gives.
            uniform_mix: share of uniform attention mixed into every pooling, 0..1.
            instance_logits: also return each scale's head on its single instances.
            composite_shares: also return each scale's head on the composite instances of these top shares.

        Raises:
            UserError: wrong shape, a bag without a real tile, instance logits of a model that cannot judge instances,
                uniform attention where max pooling has none.
        """
        asked = Asked(uniform_mix, instance_logits, composite_shares)
        self._check(tiles_BNCPP, mask_BN, asked)
        outputs = {s: self._branch(s, part, asked) for s, part in self._instances(tiles_BNCPP, mask_BN).items()}
        side = [out.logit_BK for out in outputs.values() if out.logit_BK is not None]
        logit_SBK = torch.stack(side) if side else None
        merged = self._merge(outputs, logit_SBK)
        weights = {s: out.pooled.weight_BKI for s, out in outputs.items()}
        scores = {s: out.pooled.score_BKI for s, out in outputs.items()}
        return BagOutput(
            logit_BK=merged.logit_BK,
            scale_logit_SBK=None if self.layout == "single" else logit_SBK,
            attention=self._over_labels(weights),
            score=self._over_labels(scores),
            instance_logit=_present({s: out.instance_BKI for s, out in outputs.items()}),
            scale_weight_BKS=None if merged.weight_BKS is None else self._expand(merged.weight_BKS),
            composite_logit=_present({s: out.composite_BKT for s, out in outputs.items()}),
            inner_attention=self._over_labels({s: out.inner_BKNI for s, out in outputs.items()}),
            scales=self.scales,
        )

    def _instances(self, tiles: Tiles, mask: TileMask | None) -> dict[int, Instances]:
        """{scale: its instances}; one call of the backbone, or one per tile size."""
        if isinstance(tiles, Tensor):
            assert mask is None or isinstance(mask, Tensor)
            if self.pyramid is not None:
                return pyramid_instances(self.backbone, self.pyramid, tiles, mask)
            return {self.scales[0]: pooled_instances(self.backbone, tiles, mask)}
        assert not isinstance(mask, Tensor)
        return {s: pooled_instances(self.backbone, tiles[s], None if mask is None else mask[s]) for s in self.scales}

    def _branch(self, scale: int, instances: Instances, asked: Asked) -> BranchOutput:
        branch: ScaleBranch = self.branches[str(scale)]  # type: ignore[assignment]
        if self.region is not None:
            return nested_forward(branch, self.region, instances, asked)
        head = self.classifier if self.layout == "single" else branch.head
        return branch(instances, asked, head)  # type: ignore[no-any-return]

    def _merge(self, outputs: Mapping[int, BranchOutput], logit_SBK: Tensor | None) -> Merged:
        if self.layout == "single":
            assert logit_SBK is not None
            return Merged(logit_SBK[0], None)
        if self.aggregator in ("mean_p", "max_p"):
            assert logit_SBK is not None
            return (merge_mean_probability if self.aggregator == "mean_p" else merge_max_probability)(logit_SBK)
        embedding_BSKD = torch.stack([out.pooled.embedding_BKD for out in outputs.values()], dim=1)
        assert self.classifier is not None
        if self.scale_attention is None:
            return merge_concatenation(embedding_BSKD, self.classifier)
        return merge_attention(embedding_BSKD, self.scale_attention, self.classifier)

    def _over_labels(self, by_scale: Mapping[int, Tensor | None]) -> dict[int, Tensor] | None:
        return _present({s: None if x is None else self._expand(x) for s, x in by_scale.items()})

    def _expand(self, x_BKX: Tensor) -> Tensor:
        return x_BKX.expand(-1, self.num_labels, *(-1,) * (x_BKX.dim() - 2))

    def _check(self, tiles: Tiles, mask: TileMask | None, asked: Asked) -> None:
        check_tiles(tiles, mask, in_channels=self.in_channels, sizes=self.scales if self.layout == "sizes" else None)
        if (asked.instance_logits or asked.composite_shares) and not self.judges_instances:
            raise UserError(
                "logits of instances were asked of a model that has no heads per scale, or pools regions",
                fix="set model.deep_supervision: true and model.nested: false (and train it so), or ask for none",
            )
        if asked.uniform_mix and any(isinstance(module, MaxPooling) for module in self.modules()):
            fix = "set loss.uniform_attention_share: 0, or choose a pooling with attention"
            raise UserError("uniform attention was asked of a model with max pooling, which has no attention", fix=fix)


def _present(by_scale: Mapping[int, Tensor | None]) -> dict[int, Tensor] | None:
    """What is there, or None."""
    return {s: x for s, x in by_scale.items() if x is not None} or None
