"""Heat-maps of some images, as figures: what the network saw, beside the true boxes. H W pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from torch import nn

from msmil.detection.breast import breast_masks
from msmil.detection.heatmap import maps
from msmil.engine.pipeline import Pipeline
from msmil.engine.predict import forward_batches
from msmil.models.centres import CellOffsets
from msmil.reporting.figures import MapRow, maps_figure
from msmil.types import Prediction

IMAGES: Final = 6


def map_figures(
    pipeline: Pipeline,
    network: nn.Module,
    rows_N: np.ndarray,
    predictions: Sequence[Prediction],
    *,
    instance: bool,
    offsets: CellOffsets,
) -> Iterator[tuple[str, Any]]:
    """One figure per label, (`<label>_maps`, figure): images with a box of it, from most to least probable.

    Args:
        rows_N: rows of the manifest with boxes.
        predictions: of their split.
        instance: the network judges instances, and so has maps of their logits.
        offsets: of the cells' true centres, in pixels by stride (`cell_centres`).
    """
    probability = {p.image_id: p.probability for p in predictions}
    for k, label in enumerate(pipeline.labels):
        chosen = _spread(pipeline, rows_N, label, {key: value[label] for key, value in probability.items()})
        rows = list(_map_rows(pipeline, network, chosen, k, instance=instance, offsets=offsets))
        if rows:
            yield f"{label}_maps", maps_figure(rows, label)


def _map_rows(
    pipeline: Pipeline,
    network: nn.Module,
    rows_M: np.ndarray,
    k: int,
    *,
    instance: bool,
    offsets: CellOffsets,
) -> Iterator[MapRow]:
    """The pictures of label k, image by image."""
    label = pipeline.labels[k]
    for batch, bag, output in forward_batches(
        pipeline, network, rows_M, instance_logits=instance, what=f"maps of {label}"
    ):
        breast_BHW = breast_masks(batch.image_B1HW)
        found = maps(output, bag, breast_BHW.to(output.logit_BK.device), offsets).named()
        for b, row in enumerate(batch.sample_B):
            yield MapRow(
                image_HW=batch.image_B1HW[b, 0].numpy(),
                breast_HW=breast_BHW[b].numpy(),
                maps={name: map_BKHW[b, k].cpu().numpy() for name, map_BKHW in found.items()},
                boxes=[box for box in pipeline.manifest.record(int(row)).boxes if box.label == label],
                title=f"p = {float(output.logit_BK[b, k].sigmoid()):.2f}",
            )


def _spread(pipeline: Pipeline, rows_N: np.ndarray, label: str, probability: dict[str, float]) -> np.ndarray:
    """At most IMAGES rows with a box of the label, evenly spread from the most to the least probable."""
    mine = [int(r) for r in rows_N if any(box.label == label for box in pipeline.manifest.record(int(r)).boxes)]
    names = dict(zip(mine, pipeline.manifest.text("image_id", np.array(mine, np.int64)), strict=True))
    mine.sort(key=lambda row: (-probability[names[row]], row))
    places = np.linspace(0, len(mine) - 1, num=min(IMAGES, len(mine))).round().astype(int)
    return np.array([mine[place] for place in places], np.int64)
