"""Run folders at a glance: where each one stands. Imports no torch, and one broken folder does not hide the others."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from msmil.engine.checkpoint_state import checkpoints, cut_off, newest, none_is_whole, pointed, read_state
from msmil.engine.run_folder import RunFolder, read_results
from msmil.types import TrainState
from shards.errors import UserError

State = Literal["training", "evaluated", "trained", "stopped", "failed", "no checkpoint", "converted", "unreadable"]

_DEEPEST: Final = 4  # folders beneath the one that is named: runs/<name>/fold_0 is two
_MARKS: Final = ("config.yaml", "environment.txt", "checkpoints")
_TAIL_BYTES: Final = 8192
_SAID: Final = "msmil: "  # how the launcher's own last line in log.txt begins
_STOPPED_BY_HAND: Final = ("the launcher was killed by", "exit code 130", "interrupted")
# what follows names images, whose ids may hold those of patients
_NAMES_IMAGES: Final = re.compile(r"\b(samples?|images?)\b .*", re.DOTALL)
_Loader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Where a run stands; None where it is not known.

    state: evaluated and trained have the last epoch behind them, with and without metrics of the test split; stopped
        and failed go on with the same command; converted: weights of `msmil convert`.
    epoch, epochs, step, total_steps: done by the newest checkpoint, and in all.
    best_auroc, best_step: of the mean validation AUROC over labels.
    test_auroc: mean over labels, as last evaluated; where it is not of the best checkpoint, the note says so.
    changed_s: last change, in seconds since 1970.
    note: what a person should know, or nothing.
    """

    folder: Path
    state: State
    epoch: int | None
    epochs: int | None
    step: int | None
    total_steps: int | None
    best_auroc: float | None
    best_step: int | None
    test_auroc: float | None
    changed_s: float
    note: str


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder (or itself, if it is one), in the order of their names.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("is no folder", file=folder, fix="name the folder of your runs, or train something first")
    return sorted(_walk(folder, _DEEPEST), key=lambda run: [_natural(part) for part in run.parts])


def _walk(folder: Path, deeper: int) -> Iterator[Path]:
    try:
        if any((folder / mark).exists() for mark in _MARKS):
            yield folder
            return
        inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    except PermissionError:
        yield folder
        return
    for path in inside if deeper else ():
        yield from _walk(path, deeper - 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """run_2 comes before run_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_run(root: Path) -> RunSummary:
    """What a run folder tells; what cannot be read is said in its note."""
    folder, notes = RunFolder(root), list[str]()
    epochs = saved = newest_checkpoint = None
    training = broken = evaluated = False
    test_auroc = None
    try:
        training = folder.in_training()
        newest_checkpoint = _newest(folder, notes)
        epochs = None if newest_checkpoint is None and _converted(folder) else _epochs(folder.config)
        saved = None if newest_checkpoint is None else read_state(newest_checkpoint)[0]
        test_auroc, evaluated = _test_auroc(folder, saved, notes)
    except UserError as error:
        broken = True
        notes.append(f"{error.thing}. Fix: {error.fix}")
    except OSError as error:
        broken = True
        notes.append(f"cannot be read ({error.strerror})")
    state = "unreadable" if broken else _state(folder, saved, epochs, evaluated=evaluated, notes=notes)
    nothing_yet = 0 if epochs is not None and newest_checkpoint is None else None
    return RunSummary(
        folder=root,
        state="training" if training else state,
        epoch=nothing_yet if saved is None else saved.epoch,
        epochs=epochs,
        step=nothing_yet if saved is None else saved.step,
        total_steps=None if saved is None or epochs is None else _total_steps(saved, epochs),
        best_auroc=None if saved is None else _finite(saved.best_metric),
        best_step=None if saved is None else saved.best_step,
        test_auroc=test_auroc,
        changed_s=_changed_s(folder, newest_checkpoint),
        note="; ".join(notes),
    )


def _newest(folder: RunFolder, notes: list[str]) -> Path | None:
    """The newest whole checkpoint; newer ones that are cut off are noted.

    Raises:
        UserError: none of several is whole.
    """
    found = newest(folder.checkpoints)
    broken = [one for one in checkpoints(folder.checkpoints) if found is None or one > found]
    if broken and found is None:
        raise none_is_whole(folder.checkpoints, f"{broken[-1].name}: {cut_off(broken[-1])}")
    notes += [f"{one.name} is cut off ({cut_off(one)})" for one in broken]
    return found


def _epochs(file: Path) -> int:
    """train.epochs of a configuration, of whatever version the rest of it is.

    Raises:
        UserError: there is no such file, or no such number in it.
    """
    fix = "copy the run folder again, or remove it"
    try:
        tree = yaml.load(file.read_bytes(), _Loader)
        epochs = tree["train"]["epochs"]
    except FileNotFoundError:
        raise UserError("no config.yaml", file=file.parent, fix=fix) from None
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError("config.yaml cannot be read", file=file, fix=fix) from None
    except (KeyError, TypeError, IndexError):
        epochs = None
    if not isinstance(epochs, int):
        raise UserError("config.yaml names no train.epochs", file=file, fix=fix)
    return epochs


def _converted(folder: RunFolder) -> bool:
    return not folder.checkpoints.exists() and (folder.root / "model.safetensors").exists()


def _state(
    folder: RunFolder, saved: TrainState | None, epochs: int | None, *, evaluated: bool, notes: list[str]
) -> State:
    if epochs is None:
        return "converted"
    reason = _last_word(folder.log)
    by_hand = any(text in reason for text in _STOPPED_BY_HAND)
    if reason:
        notes.append(reason)
    if saved is not None and saved.epoch >= epochs:
        return "evaluated" if evaluated else "trained"
    if reason and not by_hand:
        return "failed"
    return "no checkpoint" if saved is None else "stopped"


def _last_word(log: Path) -> str:
    """Why a run ended otherwise than it should, from the last line of its log; "" where it did not."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    last = lines[-1] if lines else ""
    if not last.startswith(_SAID):
        return ""
    thing = last.removeprefix(_SAID).removeprefix("error: ").partition(". Fix: ")[0]
    return _NAMES_IMAGES.sub(r"\1 ...", thing)


def _test_auroc(folder: RunFolder, saved: TrainState | None, notes: list[str]) -> tuple[float | None, bool]:
    """The mean test AUROC and whether there are metrics at all; what they are not of is noted."""
    if not (folder.metrics / "test.json").exists():
        return None, False
    try:
        results: Any = read_results(folder, "test")
        judged, auroc = results["checkpoint"], _finite(results["mean_auroc"])
    except (UserError, KeyError, TypeError):
        notes.append("metrics/test.json cannot be read")
        return None, False
    best = pointed(folder.checkpoints, "best") or newest(folder.checkpoints)
    if results.get("other_data_than_trained_on") or (
        saved is not None and results.get("data_fingerprint") != saved.data_fingerprint
    ):
        notes.append("the test AUROC is of other data than it was trained on")
    elif best is not None and judged != best.name:
        notes.append(f"the test AUROC is of {judged}, the best is {best.name}")
    return auroc, True


def _total_steps(saved: TrainState, epochs: int) -> int | None:
    """Steps of the whole run: an epoch has as many as those that are done had on average."""
    return None if saved.epoch == 0 else (saved.step - saved.batches_done) * epochs // saved.epoch


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _changed_s(folder: RunFolder, checkpoint: Path | None) -> float:
    files = [folder.log, folder.config, folder.metrics / "test.json", folder.root]
    times = []
    for file in [*files, checkpoint] if checkpoint is not None else files:
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
