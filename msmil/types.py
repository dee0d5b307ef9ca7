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

    tiles_BNCPP: float32; in `image` mode N is 1 and P x P is the padded H x W. With several tile sizes (msp)
        {size in px: tiles}.
    origin_N2: int64 (x, y) of each tile's corner in the padded image, likewise by size.
    pad_left_B, pad_top_B: int64 black pixels put before the image, so that padded = stored + pad.
    padded_hw: height and width of the padded image in pixels.
    """

    tiles_BNCPP: Tensor | dict[int, Tensor]
    origin_N2: Tensor | dict[int, Tensor]
    pad_left_B: Tensor
    pad_top_B: Tensor
    padded_hw: tuple[int, int]

    def of_scale(self, scale: int) -> tuple[Tensor, Tensor]:
        """Tiles and corners that a scale's instances come from."""
        tiles, origin = self.tiles_BNCPP, self.origin_N2
        return tiles[scale] if isinstance(tiles, dict) else tiles, origin[scale] if isinstance(origin, dict) else origin


@dataclass
class BagOutput:
    """Everything a model computes for a batch of bags.

    A scale is keyed by its stride, or by its tile size in px where an instance is a tile; instances of a scale are
    ordered (tile, y, x), row-major.

    logit_BK: of the aggregated probability; scale_logit_SBK: side heads (deep supervision);
    attention: {scale: weight_BKI}, sums to 1 over I; score: {scale: raw_BKI} before the probability map. Poolings
    without attention (mean, max) have neither. Nested MIL pools regions (its tiles): there I is N;
    instance_logit: {scale: raw_BKI}, the scale's head on single instances, when asked for;
    scale_weight_BKS: sums to 1 over S; None for max_p and a single scale;
    composite_logit: {scale: logit_BKT}, the scale's head on composite instances, one per asked share, T in all;
    inner_attention: {scale: weight_BKNI} of nested MIL, sums to 1 over the I instances of each real region, else 0;
    scales: all of them, in the order of S.
    """

    logit_BK: Tensor
    scale_logit_SBK: Tensor | None
    attention: dict[int, Tensor] | None
    score: dict[int, Tensor] | None
    instance_logit: dict[int, Tensor] | None
    scale_weight_BKS: Tensor | None
    composite_logit: dict[int, Tensor] | None = None
    inner_attention: dict[int, Tensor] | None = None
    scales: tuple[int, ...] = ()


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
    """Where a run stands; the same on every rank. `epoch` and `batches_done` say where the order of samples goes on.

    metric: of the validation at this very step, None where there was none.
    skipped: samples of this epoch that could not be read (data.on_error: skip).
    """

    step: int
    epoch: int
    batches_done: int
    samples_seen: int
    best_metric: float | None
    best_step: int | None
    data_fingerprint: str
    metric: float | None = None
    skipped: int = 0
