"""What was trained on what: data, split, recipe, progress, environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import yaml

from msmil.config_io import flatten, reference
from msmil.evaluation.results import number
from msmil.reporting.figures.style import words
from msmil.reporting.html import Markup, Section, details, element, join, missing, paragraph, table
from msmil.reporting.run_files import RunFiles, last_start
from msmil.reporting.trees import at, list_at, mapping_at, text_at, whole_at
from shards.types import SPLITS

_TOLD: Final = (
    "seed", "data.folds", "data.fold", "bags.instances", "bags.tile_size_px", "model.backbone", "model.weights",
    "model.pretrained", "model.instance_encoder", "model.scales", "model.mil_encoder", "model.pooling",
    "model.attention", "model.scale_aggregator", "model.deep_supervision", "loss.pos_weight", "loss.instance_weight",
    "loss.composite_weight", "optim.lr", "optim.backbone_lr_factor", "optim.weight_decay", "optim.warmup_epochs",
    "train.epochs", "train.batch_size", "train.accumulation", "train.precision", "train.encoder", "train.batch_norm",
    "train.ema_decay",
)  # fmt: skip
_ONLY_WITH: Final = {"data.fold": "data.folds", "bags.tile_size_px": "bags.instances"}
_UNUSED: Final = ("none", "image", "", None)


def data_section(run: RunFiles, prefix: str) -> Section:
    """Images, exams, patients and positives of each split."""
    data = run.trained_on
    if not data:
        command = f"msmil evaluate {run.folder} --split {run.split}"
        body = missing("This run was made before msmil wrote down the counts of its data.", command)
        return Section(f"{prefix}data", "Data", body)
    parts = [_counts(data, run.labels), _facts(data)]
    judged = text_at(run.results, "data", "fingerprint")
    if judged and judged != text_at(data, "fingerprint"):
        parts.append(element("h4", "Judged on other data than it was trained on"))
        parts += [_counts(mapping_at(run.results, "data"), run.labels), _facts(mapping_at(run.results, "data"))]
    return Section(f"{prefix}data", "Data", join(parts))


def _counts(data: Mapping[str, Any], labels: list[str]) -> Markup:
    counts = mapping_at(data, "counts")
    rows: list[list[object]] = []
    for what in ("images", "exams", "patients"):
        rows.append([what, *(_count(counts, what, split) for split in SPLITS)])
    for label in labels:
        name = words(label)
        rows.append([f"{name}: positive images", *(_positives(counts, label, split) for split in SPLITS)])
        if any(whole_at(counts, "unknown", label, split) for split in SPLITS):
            rows.append([f"{name}: unknown", *(_count(counts, "unknown", label, split) for split in SPLITS)])
        rows.append([f"{name}: boxes", *(_count(counts, "boxes", label, split) for split in SPLITS)])
    return table(["", "training", "validation", "test"], rows)


def _count(counts: Mapping[str, Any], *keys: str) -> str:
    found = whole_at(counts, *keys)
    return number(None) if found is None else f"{found:,}"


def _positives(counts: Mapping[str, Any], label: str, split: str) -> str:
    positives, images = whole_at(counts, "positives", label, split), whole_at(counts, "images", split)
    known = (images or 0) - (whole_at(counts, "unknown", label, split) or 0)
    text = _count(counts, "positives", label, split)
    return text if not positives or not known else f"{text} ({positives / known:.1%})"


def _facts(data: Mapping[str, Any]) -> Markup:
    """The stored images and where they come from, as far as it is written down."""
    height, width = whole_at(data, "height_px"), whole_at(data, "width_px")
    told = []
    if height and width:
        told.append(f"Stored images: {height} x {width} pixels (height x width), {text_at(data, 'dtype')}.")
    if recipe := text_at(data, "recipe", "name"):
        version = whole_at(data, "recipe", "version")
        told.append(f"Packing recipe: {recipe}" + ("." if version is None else f", version {version}."))
    name, fingerprint = text_at(data, "name"), text_at(data, "fingerprint")
    told.append(f"Data set: {name or 'unnamed'}, fingerprint {fingerprint[:12] or 'unknown'}.")
    if address := text_at(data, "address"):
        told.append(f"Read from {address}.")
    left_out = [f"{at(one, 'count')} images ({at(one, 'reason')})" for one in list_at(data, "left_out")]
    if left_out:
        told.append(f"Left out while packing: {', '.join(left_out)}.")
    return paragraph(" ".join(told))


def recipe_section(run: RunFiles, prefix: str) -> Section:
    """The options that matter most, how far training got, and everything else on demand."""
    flat = flatten(run.config)
    meaning = {option.key: option.doc for option in reference()}
    rows = [
        [Markup(f"<code>{key}</code>"), _value(flat[key]), meaning.get(key, "")]
        for key in _TOLD
        if flat.get(key) not in ("", None) and not (key in _ONLY_WITH and flat.get(_ONLY_WITH[key]) in _UNUSED)
    ]
    if not rows:
        return Section(f"{prefix}recipe", "Recipe", missing("config.yaml cannot be read."))
    parts = [paragraph(_progress(run)), table(["option", "value", "meaning"], rows, left=3, class_="options told")]
    whole = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
    parts.append(details("The whole configuration", element("pre", whole)))
    if run.environment:
        parts.append(details("Environment of every start", element("pre", run.environment.strip())))
    return Section(f"{prefix}recipe", "Recipe", join(parts))


def _progress(run: RunFiles) -> str:
    start = last_start(run.environment)
    text = f"Trained: {run.progress}."
    if run.is_finished is False:
        text += f" Training is not finished; it goes on with: msmil train {run.folder / 'config.yaml'}."
    if start:
        starts = "1 start" if start["starts"] == "1" else f"{start['starts']} starts"
        ranks, commit = start.get("ranks", "unknown"), start.get("commit", "unknown")[:12]
        text += f" {starts}, the last one {start.get('started', '')}; ranks: {ranks}; commit {commit}."
    return text


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
