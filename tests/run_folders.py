"""Run folders as training and evaluation leave them, made up in a moment: for what reads them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from msmil.config import Config
from msmil.config_io import dump_config
from msmil.evaluation.predictions import write_predictions
from msmil.evaluation.results import classification_results
from msmil.reporting.figures import MapRow
from msmil.reporting.gallery import Case, choose, writing_gallery
from msmil.types import Prediction
from shards.types import Box

LABELS = ("Mass", "Suspicious_Calcification")
SCALES = (8, 16)
SECRET = "secretpatient"  # in every id: a page that shows none does not hold it


def predictions(split: str, *, labels=LABELS, patients=20, prevalence=0.4, seed=0) -> list[Prediction]:
    """Two images per patient, ranked better than chance."""
    rng = np.random.default_rng([seed, len(split)])
    rows = []
    for number in range(2 * patients):
        target = {label: int(rng.random() < prevalence) for label in labels}
        probability = {label: float(1 / (1 + np.exp(-rng.normal() - 2 * t + 1))) for label, t in target.items()}
        weight = {label: float(rng.random()) for label in labels}
        ids = [f"{SECRET}_{kind}_{split}_{n}" for kind, n in (("i", number), ("e", number // 2), ("p", number // 2))]
        by_scale = {(s, label): probability[label] for s in SCALES for label in labels}
        weights = {(s, label): w if s == SCALES[0] else 1 - w for s in SCALES for label, w in weight.items()}
        rows.append(Prediction(*ids, target, probability, by_scale, weights))
    return rows


def make_run(
    folder: Path,
    *,
    labels: tuple[str, ...] = LABELS,
    shape: tuple[int, int] = (48, 36),
    evaluated: bool = True,
    validated: bool = True,
    trained: bool = True,
    gallery: bool = True,
    prevalence: float = 0.4,
    seed: int = 0,
) -> Path:
    """A run folder without weights; what is False is not there yet."""
    folder.mkdir(parents=True)
    config = replace(Config(name=folder.name, seed=seed), data=replace(Config().data, labels=labels))
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.txt").write_text("started: 2026-01-01T10:00:00+00:00\nranks: 2 on CPU\ncommit: abc\n\n")
    counts = {"images": {"train": 80, "val": 40, "test": 40}, "positives": {key: {"train": 7} for key in labels}}
    data = {"name": "made up", "fingerprint": "f" * 64, "height_px": 48, "width_px": 36, "counts": counts}
    (folder / "data.json").write_text(json.dumps(data))
    if trained:
        write_events(folder / "tensorboard", labels, validated=validated)
        state = folder / "checkpoints" / "step_00000020" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"train_state": {"epoch": 3, "step": 20, "batches_done": 0}}))
    if evaluated:
        _evaluate(folder, labels, shape, prevalence=prevalence, seed=seed, gallery=gallery)
    return folder


def write_events(folder: Path, labels: tuple[str, ...], *, validated: bool = True) -> None:
    """Scalars as training writes them."""
    writer = EventFileWriter(str(folder))
    for step in range(1, 21):
        values = {"train/loss/total": 3 / step, "train/loss/aggregated": 1 / step, "train/images_per_s": 20.0}
        values |= {f"train/loss/label/{label}": 1 / step for label in labels}
        values |= {"train/seconds/step": 0.5, "train/seconds/wait": 0.1, "train/memory_gb": 1.5}
        if validated and step % 10 == 0:
            values |= {f"val/auroc/{label}": 0.5 + step / 50 for label in labels} | {"val/auroc/mean": 0.5 + step / 50}
            values |= {f"val/auroc/{label}/scale_{s}": 0.5 + step / 60 for label in labels for s in SCALES}
        for tag, value in values.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=1.7e9 + step, step=step, summary=summary))
    writer.close()


def _evaluate(
    folder: Path, labels: tuple[str, ...], shape: tuple[int, int], *, prevalence: float, seed: int, gallery: bool
) -> None:
    test, val = (predictions(split, labels=labels, prevalence=prevalence, seed=seed) for split in ("test", "val"))
    for split, rows in (("test", test), ("val", val)):
        write_predictions(folder / "predictions" / f"{split}.csv", rows, labels, SCALES)
    results = classification_results(test, val, labels, SCALES, replicates=20, confidence=0.9, seed=seed)
    found = {"images": 9, "hits": 6, "rate": 6 / 9, "chance": 0.02, "ratio": 33.3}
    about = {"split": "test", "checkpoint": "step_00000020", "data_fingerprint": "f" * 64}
    results |= about | {"other_data_than_trained_on": False, "localisation": {labels[0]: {"merged": found}}}
    if gallery:
        write_gallery(folder / "gallery" / "test", test, results, labels, shape, about)
    (folder / "metrics").mkdir()
    (folder / "metrics" / "test.json").write_text(json.dumps(results))


def write_gallery(
    folder: Path,
    rows: list[Prediction],
    results: dict[str, Any],
    labels: tuple[str, ...],
    shape: tuple[int, int],
    about: dict[str, Any],
) -> None:
    """Two cases of every kind per label, with an attention and an instance map per scale."""
    rng = np.random.default_rng(0)
    with writing_gallery(folder, about) as writer:
        for label in labels:
            threshold = results["labels"][label]["threshold"]
            choices, counts = choose(rows, label, threshold, 2)
            writer.label(label, threshold=threshold, counts=counts)
            for choice in choices:
                row = map_row(rng, shape, boxes=[Box(label, 2, 2, 9, 9), Box("Other", 5, 5, 12, 12)])
                ranges = dict.fromkeys(row.maps, (0.01, 0.9))
                writer.add(Case(label=label, choice=choice, row=row, ranges=ranges, peak_in_box=True, view="R MLO"))


def map_row(rng: np.random.Generator, shape: tuple[int, int], **more: Any) -> MapRow:
    """An image of noise with maps of noise; its left half is breast."""
    breast_HW = np.zeros(shape, bool)
    breast_HW[:, : max(1, shape[1] // 2)] = True
    names = ["merged", *(f"{kind}_{s}" for kind in ("attention", "instance") for s in SCALES)]
    image_HW = (rng.random(shape) * 255).astype(np.uint8)
    return MapRow("row", image_HW, breast_HW, {name: rng.normal(size=shape) for name in names}, **more)


class Page(HTMLParser):
    """What a page holds: elements with their attributes, anchors, and its text as a reader sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self._texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.elements or self.elements[-1][0] not in ("style", "script"):
            self._texts.append(data)

    def of(self, tag: str, attribute: str) -> list[str]:
        """The values of an attribute, over all elements of a tag (any: *)."""
        return [str(a[attribute]) for name, a in self.elements if tag in ("*", name) and attribute in a]
