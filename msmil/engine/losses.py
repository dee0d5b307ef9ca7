"""What is minimised: binary cross-entropy per label over the aggregated head, the scales' heads and the bags' top.

Legend: N images of a data set, B bags, S scales, I instances of one scale, T top shares, K labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from msmil.config import LossConfig
from msmil.models.top import top_mean
from msmil.types import BagOutput
from shards.types import UNKNOWN


@dataclass(frozen=True, slots=True)
class LossParts:
    """A loss and what it is made of. Each is this micro-batch's share: sums over micro-batches and ranks are means.

    total: scalar to differentiate, aggregated + sum of per_scale + weights * auxiliary; without the aggregated term
        where it has no head of its own.
    aggregated: scalar. per_scale: {scale: scalar}, empty without deep supervision.
    auxiliary: {"instance" or "composite": scalar before its weight}, those that are on. per_label_K: total by label.
    """

    total: Tensor
    aggregated: Tensor
    per_scale: dict[int, Tensor]
    auxiliary: dict[str, Tensor]
    per_label_K: Tensor

    def named(self, labels: Sequence[str]) -> dict[str, Tensor]:
        """Every part by its name in TensorBoard, detached, at least fp32; `labels` are those of the loss, in order."""
        parts = {"total": self.total, "aggregated": self.aggregated}
        parts |= {f"label/{label}": value for label, value in zip(labels, self.per_label_K, strict=True)}
        parts |= {f"scale/{scale}": value for scale, value in self.per_scale.items()}
        precise = torch.promote_types(self.total.dtype, torch.float32)
        return {name: value.detach().to(precise) for name, value in (parts | self.auxiliary).items()}


class BagLoss(nn.Module):
    """L = BCE(logit) + sum_s BCE(scale_logit_s) + sum_s (instance_weight A_s + composite_weight C_s).

    The first two terms are FPN-MIL's L_ms + sum_s L_s. Each BCE is a sum over known labels divided by `global_count`:
    padded samples and unknown labels add exactly 0, to the gradient too. A_s is the BCE of the mean instance logit
    over the top share of positions, C_s that of the logit of the composite instance; both are averaged over the
    configured shares. Computed in at least fp32.

    Where the aggregated logit is that of the scales' probabilities (mean_p, max_p) its term is reported, and left out
    of the sum (FPN-MIL: these aggregators train the scales' heads alone).

    Args:
        config: the loss section.
        pos_weight_K: factor of the positive term, one per label.
        fused_head: the aggregated logit comes from a head of its own.
    """

    pos_weight_K: Tensor

    def __init__(
        self,
        config: LossConfig,
        pos_weight_K: np.ndarray | Tensor | Sequence[float],
        *,
        fused_head: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.fused_head = fused_head
        self.register_buffer("pos_weight_K", torch.as_tensor(pos_weight_K, dtype=torch.float32), persistent=False)

    @property
    def asks(self) -> dict[str, Any]:
        """What the model has to be asked for, so that its output holds all that the loss needs."""
        return {
            "instance_logits": self.config.instance_weight > 0,
            "composite_shares": self.config.top_fractions if self.config.composite_weight > 0 else (),
        }

    def forward(self, output: BagOutput, label_BK: Tensor, weight_B: Tensor, *, global_count: float) -> LossParts:
        """The loss of a micro-batch.

        Args:
            output: the model's.
            label_BK: 1, 0 or -1 (unknown).
            weight_B: weight of each sample; 0 marks padding.
            global_count: images of the global batch x labels.
        """
        weight_BK = weight_B[:, None] * (label_BK != UNKNOWN) / global_count

        def bce(logit_BK: Tensor) -> Tensor:
            return self._bce(logit_BK, label_BK, weight_BK)

        aggregated_K = bce(output.logit_BK)
        total_K = aggregated_K if self.fused_head else torch.zeros_like(aggregated_K)
        per_scale: dict[int, Tensor] = {}
        if output.scale_logit_SBK is not None:
            for scale, logit_BK in zip(output.scales, output.scale_logit_SBK, strict=True):
                scale_K = bce(logit_BK)
                per_scale[scale] = scale_K.detach().sum()
                total_K = total_K + scale_K
        auxiliary: dict[str, Tensor] = {}
        for name, weight, top_BK in self._auxiliary(output):
            auxiliary_K = torch.stack([bce(logit_BK) for logit_BK in top_BK]).sum(0) / len(self.config.top_fractions)
            auxiliary[name] = auxiliary_K.detach().sum()
            total_K = total_K + weight * auxiliary_K
        return LossParts(
            total=total_K.sum(),
            aggregated=aggregated_K.detach().sum(),
            per_scale=per_scale,
            auxiliary=auxiliary,
            per_label_K=total_K.detach(),
        )

    def _auxiliary(self, output: BagOutput) -> Iterator[tuple[str, float, list[Tensor]]]:
        """Name and weight of each loss that is on, and its logits [B, K], one per scale and share."""
        config = self.config
        if config.instance_weight > 0:
            assert output.instance_logit is not None, "call the model with instance_logits=True"
            maps = output.instance_logit.values()
            tops = [top_mean(logit_BKI, share) for logit_BKI in maps for share in config.top_fractions]
            yield "instance", config.instance_weight, tops
        if config.composite_weight > 0:
            assert output.composite_logit is not None, "call the model with composite_shares"
            tops = [logit_BK for logit_BKT in output.composite_logit.values() for logit_BK in logit_BKT.unbind(-1)]
            yield "composite", config.composite_weight, tops

    def _bce(self, logit_BK: Tensor, label_BK: Tensor, weight_BK: Tensor) -> Tensor:
        """Weighted sum over the bags, per label. What has no weight is replaced first: 0 times NaN would be NaN."""
        dtype = torch.promote_types(logit_BK.dtype, torch.float32)
        counts_BK = weight_BK > 0
        logit_BK = torch.where(counts_BK, logit_BK.to(dtype), 0.0)
        target_BK = torch.where(counts_BK, label_BK.to(dtype), 0.0)
        loss_BK = functional.binary_cross_entropy_with_logits(
            logit_BK, target_BK, pos_weight=self.pos_weight_K.to(dtype), reduction="none"
        )
        return (loss_BK * weight_BK).sum(0)


def auto_pos_weight(
    label_NK: np.ndarray, labels: Sequence[str], share_N: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """negatives / positives per label over its known values, and warnings for the user.

    Args:
        label_NK: 1, 0 or -1 (unknown).
        labels: names, for the warnings.
        share_N: how often each image is drawn, where that is not alike; images count by it.

    Returns:
        weight_K (float64), and one text for each label that lacks positives or negatives: its weight is 1.
    """
    count_N = np.ones(len(label_NK), np.int64) if share_N is None else share_N
    positives_K, negatives_K = count_N @ (label_NK == 1), count_N @ (label_NK == 0)
    weights, warnings = [], []
    for k, (name, positives, negatives) in enumerate(
        zip(labels, positives_K.tolist(), negatives_K.tolist(), strict=True)
    ):
        if positives and negatives:
            weights.append(negatives / positives)
            continue
        weights.append(1.0)
        missing = "positives" if not positives else "negatives"
        warnings.append(
            f"label {name} has no {missing} among its {(label_NK[:, k] >= 0).sum()} known training images: pos_weight 1"
        )
    return np.asarray(weights), warnings
