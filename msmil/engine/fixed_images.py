"""The same validation images after every validation, with the map of each label: one sees the network learn to look.

H W pixels of a stored image, N images of a split, M chosen ones, K labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Final

import numpy as np

from msmil.detection.breast import breast_masks
from msmil.detection.heatmap import maps
from msmil.engine.pipeline import Pipeline, known_labels
from msmil.engine.predict import forward_batches
from msmil.models.centres import cell_centres
from msmil.models.mil import MILModel
from msmil.reporting.figures import MapRow
from msmil.reporting.strip import as_jpeg, map_strip
from shards.manifest import Manifest
from shards.types import UNKNOWN, Split

_MOST_LABELS: Final = 4  # maps on one strip; of more labels an image shows its own first
_TRUTH: Final = {1: "present", 0: "absent", UNKNOWN: "unknown"}


def choose_rows(manifest: Manifest, split: Split, labels: Sequence[str], count: int) -> np.ndarray:
    """At most `count` rows of a split: a pure function of the arguments, so that a resumed run shows the same.

    Half of them (rounded up) have a box of a label, the labels taking turns; then images without any of the labels;
    where there are too few, any others. Each kind is evenly spread over the rows, and so over the patients.
    """
    rows_N = manifest.rows(split)
    label_NK = known_labels(manifest, rows_N, tuple(labels))
    boxed: list[list[int]] = []
    for k, label in enumerate(labels):
        positive = rows_N[label_NK[:, k] == 1].tolist()
        boxed.append([row for row in positive if any(box.label == label for box in manifest.record(row).boxes)])
    half, share = -(-count // 2), -(-count // (2 * len(labels)))
    turns = chain.from_iterable(zip_longest(*(_spread(rows, share) for rows in boxed)))
    chosen = list(dict.fromkeys(row for row in turns if row is not None))[:half]
    negative = rows_N[(label_NK == 0).all(axis=1)].tolist()
    for rows, wanted in (([*chain.from_iterable(boxed)], half), (negative, count), (rows_N.tolist(), count)):
        left = sorted(set(rows).difference(chosen))
        chosen += _spread(left, wanted - len(chosen))
    return np.array(chosen, np.int64)


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread over them."""
    places = np.linspace(0, len(rows) - 1, num=min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def strips(pipeline: Pipeline, network: MILModel, rows_M: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """(name, JPEG) of each of the images, in order. Calls no collective: one rank may do it alone.

    A map is the merged one, as the evaluation judges it. Needs a network that has maps.
    """
    offsets = cell_centres(network, pipeline.tile_hw)
    labels, number = pipeline.labels, 0
    instance = network.judges_instances
    for batch, bag, output in forward_batches(pipeline, network, rows_M, instance_logits=instance, what=None):
        assert batch.image_B1HW is not None
        breast_BHW = breast_masks(batch.image_B1HW)
        merged_BKHW = maps(output, bag, breast_BHW.to(output.logit_BK.device), offsets).merged_BKHW
        probability_BK = output.logit_BK.float().sigmoid().tolist()
        for b, label_K in enumerate(batch.label_BK.tolist()):
            number += 1
            shown = _shown(label_K)
            row = MapRow(
                title=f"image {number}",
                image_HW=batch.image_B1HW[b, 0].numpy(),
                breast_HW=breast_BHW[b].numpy(),
                maps={labels[k]: merged_BKHW[b, k].cpu().numpy() for k in shown},
                boxes=pipeline.manifest.record(int(batch.sample_B[b])).boxes,
            )
            captions = [f"{labels[k]}\n{_TRUTH[label_K[k]]}, p = {probability_BK[b][k]:.2f}" for k in shown]
            yield f"{number}_{_finding(label_K, labels)}", as_jpeg(map_strip(row, captions))


def _shown(label_K: Sequence[int]) -> list[int]:
    """The labels that get a map, in order: those that are present before the others."""
    return sorted(sorted(range(len(label_K)), key=lambda k: label_K[k] != 1)[:_MOST_LABELS])


def _finding(label_K: Sequence[int], labels: Sequence[str]) -> str:
    """What is known of an image, as a part of a name."""
    present = [label for label, value in zip(labels, label_K, strict=True) if value == 1]
    return "+".join(present) or ("unknown" if UNKNOWN in label_K else "negative")
