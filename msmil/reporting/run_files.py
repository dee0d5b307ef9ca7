"""What lies in a run folder, read with care: from any version, cut off anywhere, without torch and without shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from msmil.evaluation.classification import METRICS, Threshold, rank, scores
from msmil.evaluation.predictions import read_predictions
from msmil.evaluation.results import columns
from msmil.reporting.curves import Curves, read_curves
from msmil.reporting.gallery import Gallery, read_gallery
from msmil.reporting.trees import at, bounds_at, mapping_at, number_at, text_at, whole_at
from msmil.types import Prediction
from shards.errors import UserError
from shards.types import SPLITS

_SAME: Final = 1e-9  # metrics and predictions of one evaluation agree to the last digits


@dataclass(frozen=True)
class RunFiles:
    """A run folder. What is missing or unreadable is empty or None; `problems` says what could not be used, and why.

    name: for people, unique among the runs of a report; config: as written, of whatever version; data: what it was
    trained on (data.json); state: where training stands; results: metrics/<split>.json; other_splits: that have some.
    """

    folder: Path
    name: str
    split: str
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    state: Mapping[str, Any]
    environment: str
    results: Mapping[str, Any]
    other_splits: Sequence[str]
    problems: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The labels that were judged, or that are learned where nothing was judged yet."""
        judged = [str(name) for name in mapping_at(self.results, "labels")]
        learned = at(self.config, "data", "labels")
        return judged or [str(name) for name in (learned if isinstance(learned, list) else [])]

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """The data it was trained on: data.json, or, in an older run, those it was judged on, if they are the same."""
        same = at(self.results, "other_data_than_trained_on") is False
        return self.data or (mapping_at(self.results, "data") if same else {})

    @property
    def judged_images(self) -> str:
        """A digest that runs judged on the same images share: all folds of one folder have the same test images."""
        packed = text_at(self.results, "data", "packed_fingerprint")
        return packed if packed and self.split == "test" else text_at(self.results, "data_fingerprint")

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Of the split, where they are those that the metrics were computed from; empty otherwise."""
        if not mapping_at(self.results, "labels"):
            return []
        file = self.folder / "predictions" / f"{self.split}.csv"
        try:
            found = read_predictions(file)
        except UserError:
            # its message may name an image
            self.problems.append(f"predictions/{self.split}.csv is missing, damaged or of another version.")
            return []
        differing = [label for label in self.labels if not _belongs(found, self.results, label)]
        if differing:
            thing = f"predictions/{self.split}.csv and metrics/{self.split}.json are of different evaluations"
            self.problems.append(f"{thing} ({', '.join(differing)} differ): no figure is drawn from the former.")
            return []
        return found

    @cached_property
    def curves(self) -> Curves:
        """What TensorBoard's events hold."""
        return read_curves(self.folder / "tensorboard")

    @cached_property
    def gallery(self) -> Gallery | None:
        """Of the split, where it was made by the evaluation that the metrics are of."""
        found = read_gallery(self.folder / "gallery" / self.split)
        if found is None or not mapping_at(self.results, "labels"):
            return None
        keys = ("checkpoint", "data_fingerprint", "split")
        if any(at(found.index, key) != at(self.results, key) for key in keys):
            self.problems.append(f"gallery/{self.split} is of another evaluation than metrics/{self.split}.json.")
            return None
        return found

    def branch(self, label: str, scale: str | None = None) -> dict[str, Any]:
        """Every metric of METRICS with its `_ci`, and the threshold, of a label or of one of its scales; or None."""
        keys = ("labels", label) if scale is None else ("labels", label, "scales", scale)
        found: dict[str, Any] = {"threshold": number_at(self.results, *keys, "threshold")}
        for metric in METRICS:
            found[metric] = number_at(self.results, *keys, metric)
            found[f"{metric}_ci"] = bounds_at(self.results, *keys, f"{metric}_ci")
        if found["sensitivity"] is None or found["specificity"] is None:
            found["threshold"] = None if found["balanced_accuracy"] is None else found["threshold"]
        return found

    @property
    def progress(self) -> str:
        """How far training got, in words."""
        if not self.epochs_done:
            return "unknown, there is no checkpoint in this folder"
        batches = whole_at(self.state, "batches_done")
        return f"{self.epochs_done} epochs" + (f" and {batches} steps of the next" if batches else "")

    @property
    def epochs_done(self) -> str:
        """Epochs of all epochs, empty where no checkpoint tells: 3 of 8."""
        epoch, epochs = whole_at(self.state, "epoch"), whole_at(self.config, "train", "epochs")
        if epoch is None:
            return ""
        return str(epoch) if epochs is None else f"{epoch} of {epochs}"

    @property
    def is_finished(self) -> bool | None:
        """Whether the last epoch is done; None where nobody can tell."""
        epoch, epochs = whole_at(self.state, "epoch"), whole_at(self.config, "train", "epochs")
        return None if epoch is None or epochs is None else epoch >= epochs


def read_run(folder: Path, *, name: str, split: str) -> RunFiles:
    """Read a run folder.

    Raises:
        UserError: it is no run folder (no config.yaml).
    """
    _check(folder)
    problems: list[str] = []
    config = _mapping(folder / "config.yaml", problems)
    state = _state(folder / "checkpoints", problems)
    results = _mapping(folder / "metrics" / f"{split}.json", problems)
    return RunFiles(
        folder=folder,
        name=name,
        split=split,
        config=config,
        data=_mapping(folder / "data.json", problems),
        state=state,
        environment=_text(folder / "environment.txt"),
        results=results,
        other_splits=[other for other in SPLITS if other != split and (folder / "metrics" / f"{other}.json").is_file()],
        problems=problems,
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of its parents as make all names differ."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]).removeprefix("//") for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _state(checkpoints: Path, problems: list[str]) -> Mapping[str, Any]:
    """Where the newest checkpoint that can be read stands; {} where there is none."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        if state := mapping_at(_mapping(folder / "state.json", problems), "train_state"):
            return state
    return {}


def _check(folder: Path) -> None:
    if (folder / "config.yaml").is_file():
        return
    inside = sorted(path.parent.name for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    fix = "name a folder beneath runs/"
    if inside:
        fix = f"name the runs in it, such as {folder / inside[0]}"
    raise UserError("is no run folder (no config.yaml)", file=folder, fix=fix)


def _mapping(file: Path, problems: list[str]) -> Mapping[str, Any]:
    """The mapping that a YAML or JSON file holds; empty where there is none, which is a problem if there is a file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, Mapping):
        problems.append(f"{file.parent.name}/{file.name} cannot be read.")
        return {}
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _belongs(predictions: Sequence[Prediction], results: Mapping[str, Any], label: str) -> bool:
    """Whether a label's metrics were computed from these predictions, as far as its AUROC and images tell."""
    if label not in predictions[0].target or whole_at(results, "images") not in (None, len(predictions)):
        return False
    if "auroc" not in mapping_at(results, "labels", label):
        return True
    target_N, probability_N = columns(predictions, label, None)
    auroc = scores(rank(target_N, probability_N), Threshold(None, "not asked for")).value["auroc"]
    stated = number_at(results, "labels", label, "auroc")
    if auroc is None or stated is None:
        return auroc is None and stated is None
    return bool(np.isclose(auroc, stated, rtol=0, atol=_SAME))


def last_start(environment: str) -> dict[str, str]:
    """The newest entry of environment.txt, key by key, and under `starts` how many there are."""
    entries = [entry for entry in environment.split("\n\n") if entry.strip()]
    if not entries:
        return {}
    pairs = [line.partition(": ") for line in entries[-1].splitlines()]
    return {key: value for key, found, value in pairs if found} | {"starts": str(len(entries))}


def checkpoint_step(results: Mapping[str, Any]) -> int | None:
    """The step that was evaluated: step_00001225 -> 1225."""
    digits = text_at(results, "checkpoint").removeprefix("step_")
    return int(digits) if digits.isdigit() else None
