"""What flows from a bag to a detection.

B bags, H W pixels, N tiles, C channels, P tile side, I instances of one scale, S scales, D channels, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Bag:
    """What a model is called on, made on the device from an image batch.

    tiles_BNCPP: float32; in `image` mode N is 1 and P x P is the padded H x W.
    origin_N2: int64 (x, y) of each tile's corner in the padded image.
    pad_left_B, pad_top_B: int64 black pixels put before the image, so that padded = stored + pad.
    padded_hw: height and width of the padded image in pixels.
    """

    tiles_BNCPP: Tensor
    origin_N2: Tensor
    pad_left_B: Tensor
    pad_top_B: Tensor
    padded_hw: tuple[int, int]


@dataclass(slots=True)
class BagOutput:
    """Everything a model computes for a batch of bags.

    A scale is keyed by its stride; instances of a scale are ordered (tile, y, x), row-major.

    logit_BK: of the aggregated probability; scale_logit_SBK: side heads (deep supervision);
    attention: {scale: weight_BKI}, sums to 1 over I; score: {scale: raw_BKI} before the probability map;
    instance_logit: {scale: raw_BKI}, the scale's head on single instances, when asked for;
    scale_weight_BKS: sums to 1 over S;
    composite_logit: {scale: logit_BKT}, the scale's head on composite instances, one per asked share, T in all.
    """

    logit_BK: Tensor
    scale_logit_SBK: Tensor | None
    attention: dict[int, Tensor] | None
    score: dict[int, Tensor] | None
    instance_logit: dict[int, Tensor] | None
    scale_weight_BKS: Tensor | None
    composite_logit: dict[int, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row per image. Probabilities by label; per-scale ones by (scale, label)."""

    image_id: str
    exam_id: str
    patient_id: str
    target: dict[str, int]
    probability: dict[str, float]
    scale_probability: dict[tuple[int, str], float]
    scale_weight: dict[tuple[int, str], float]


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands; the same on every rank. `epoch` and `batches_done` say where the order of samples goes on."""

    step: int
    epoch: int
    batches_done: int
    samples_seen: int
    best_metric: float | None
    best_step: int | None
    data_fingerprint: str
