"""Pictures of the most telling images of a split: what the network saw, beside the true boxes. H W pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from msmil.detection.breast import breast_masks
from msmil.detection.heatmap import MERGED, maps
from msmil.detection.localisation import box_mask, peaks
from msmil.engine.pipeline import Pipeline
from msmil.engine.predict import forward_batches
from msmil.models.centres import CellOffsets
from msmil.models.mil import MILModel
from msmil.reporting.figures import MapRow, maps_figure, reduced, save
from msmil.reporting.gallery import IMAGE_PX, KINDS, Case, Choice, choose, writing_gallery
from msmil.types import Prediction

_IN_FIGURE: Final = 2  # images of each kind in a label's figure


@dataclass(frozen=True)
class Showing:
    """What pictures are made from: a network on its data, and what it predicted for a split."""

    pipeline: Pipeline
    network: MILModel
    offsets: CellOffsets
    split: str
    predictions: Sequence[Prediction]

    @property
    def has_maps(self) -> bool:
        """Whether the network says where it looks."""
        return self.network.has_attention or self.network.judges_instances


def write_pictures(
    showing: Showing, results: Mapping[str, Any], *, per_kind: int, gallery: Path, figures: Path
) -> None:
    """Write the gallery of a split, and of each label the figure <split>_<label>_maps.png with the first of them.

    Args:
        showing: what to show.
        results: of the same split (`classification_results`), with its checkpoint and data_fingerprint.
        per_kind: hits, misses and false alarms per label; 0 writes nothing.
        gallery, figures: folders of the run.

    Raises UserError where something cannot be written.
    """
    if per_kind == 0:
        return
    about = {key: results[key] for key in ("split", "checkpoint", "data_fingerprint")}
    with writing_gallery(gallery / showing.split, about) as writer:
        for k, label in enumerate(showing.pipeline.labels):
            threshold = results["labels"][label]["threshold"]
            choices, counts = choose(showing.predictions, label, threshold, per_kind)
            writer.label(label, threshold=threshold, counts=counts)
            cases = list(_cases(showing, k, choices))
            for case in cases:
                writer.add(case)
            if cases and showing.has_maps:
                figure = maps_figure([case.row for case in _first(cases)], label)
                save(figure, figures / f"{showing.split}_{label}_maps.png")


def _first(cases: Sequence[Case]) -> list[Case]:
    return [case for kind in KINDS for case in [c for c in cases if c.choice.kind == kind][:_IN_FIGURE]]


def _cases(showing: Showing, k: int, choices: Sequence[Choice]) -> Iterator[Case]:
    """The pictures of label k, in the order of its choices."""
    pipeline, network = showing.pipeline, showing.network
    label = pipeline.labels[k]
    rows_M = pipeline.manifest.rows(showing.split)[[choice.number - 1 for choice in choices]]
    remaining = iter(choices)
    for batch, bag, output in forward_batches(
        pipeline, network, rows_M, instance_logits=network.judges_instances, what=f"pictures of {label}"
    ):
        assert batch.image_B1HW is not None
        breast_BHW = breast_masks(batch.image_B1HW)
        found: dict[str, Tensor] = {}
        if showing.has_maps:
            named = maps(output, bag, breast_BHW.to(output.logit_BK.device), showing.offsets).named()
            found = {name: map_BKHW[:, k].cpu() for name, map_BKHW in named.items()}
        for b, row in enumerate(batch.sample_B):
            choice = next(remaining)
            record = pipeline.manifest.record(int(row))
            assert record.image_id == choice.prediction.image_id, "pictures of another image"
            breast_HW = breast_BHW[b]
            own = [box for box in record.boxes if box.label == label]
            shown = MapRow(
                title=f"{choice.kind.replace('_', ' ')}, p = {choice.prediction.probability[label]:.2f}",
                image_HW=batch.image_B1HW[b, 0].numpy(),
                breast_HW=breast_HW.numpy(),
                maps={name: map_BHW[b].numpy() for name, map_BHW in found.items()},
                boxes=record.boxes,
            )
            yield Case(
                label=label,
                choice=choice,
                row=reduced(shown, IMAGE_PX),
                ranges={name: _range(name, map_BHW[b][breast_HW]) for name, map_BHW in found.items()},
                peak_in_box=_peak_in(own, found[MERGED][b], breast_HW) if own and found else None,
                view=f"{record.laterality} {record.view}",
            )


def _range(name: str, inside: Tensor) -> tuple[float, float]:
    """Lowest and highest value of a map in the breast; those of logits as probabilities."""
    if name.startswith("instance_"):
        inside = inside.sigmoid()
    return float(inside.min()), float(inside.max())


def _peak_in(boxes: Sequence[Any], map_HW: Tensor, breast_HW: Tensor) -> bool:
    peak = int(peaks(map_HW[None, None], breast_HW[None])[0, 0])
    return bool(box_mask(boxes, (breast_HW.shape[0], breast_HW.shape[1])).ravel()[peak])
