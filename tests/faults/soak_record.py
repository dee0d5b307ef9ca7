"""The record of a soak: when each kill struck and what became of the run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.places import step_of

_PACKAGES = ("torch", "accelerate", "timm", "safetensors")
_WORDS = """\
SIGKILL of one rank, drawn at random, at a moment drawn uniformly over the seconds that an unbroken run takes; then the
same command again, until the run ends. DDP over gloo, with dropout, augmentation, averaged weights and 2 accumulation
steps, a save every 2 steps. Compared are the bytes of weights, moments and averaged weights. When a rank has died, the
launcher sends SIGTERM to the others, as torchrun does: they end by that signal (while they start, or once they have
noticed that the connection to the dead rank broke and wait for their launcher) or by themselves, with exit code 1; by
SIGKILL those that have not ended half a minute later. Step 0 is a start from scratch."""
_ENDED = {1: "by itself", -15: "by SIGTERM", -9: "by SIGKILL"}


@dataclass(frozen=True)
class Kill:
    """One kill: of which start, when, where the rank was, how the others ended, what was left on the disk.

    start, goes_on: the steps that the killed start and the one behind it went on from, 0 for a fresh one.
    """

    run: int
    ranks: int
    workers: int
    start: int
    rank: int = 0
    moment_s: float = 0.0
    place: str = ""
    others: tuple[int, ...] = ()
    half_written: bool = False
    goes_on: int = 0
    identical: bool = False


@dataclass
class Soak:
    """What was counted."""

    kills: list[Kill]
    runs: int
    identical: int
    unbroken: int
    left_behind: int
    failed_starts: list[str]


def write_record(file: Path, soak: Soak, *, wanted: int, seed: int, seconds: float) -> None:
    """Write the record as Markdown."""
    kills = soak.kills
    totals = [
        ("kills", f"{len(kills)} (asked for: {wanted})"),
        ("runs, each killed until it ended", soak.runs),
        ("of them bit-identical to the unbroken run", f"**{soak.identical} of {soak.runs}**"),
        ("unbroken runs, all of one number of ranks identical", soak.unbroken),
        ("kills of a world of 2 ranks, of 3 ranks", _counts(kill.ranks for kill in kills)),
        ("kills with a decoding process per rank", sum(kill.workers > 0 for kill in kills)),
        ("kills of rank 0, 1, 2", _counts(kill.rank for kill in kills)),
        ("where the killed rank was", _counts(_inside(kill.place) for kill in kills)),
        ("kills that left a half-written checkpoint", sum(kill.half_written for kill in kills)),
        ("how the other ranks ended", _counts(_ENDED.get(code, str(code)) for kill in kills for code in kill.others)),
        ("kills behind which the run went on from a checkpoint", sum(kill.goes_on > 0 for kill in kills)),
        ("processes left behind", soak.left_behind),
        ("starts that failed without a kill", len(soak.failed_starts)),
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    lines = [
        "# A soak: one rank killed, again and again",
        "",
        f"`python -m tests.faults.soak --kills {wanted} --seed {seed}`: {seconds / 60:.0f} minutes on "
        f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, {versions}.",
        "",
        _WORDS,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in totals),
        "",
        *(f"- {text}" for text in soak.failed_starts),
        "",
        "`step 7, save`: while it saved in or behind its step 7; `step 7` alone: between phases (waiting for images or "
        "for the sum of the loss).",
        "",
        "| kill | run | ranks | decoding processes | start went on from step | killed rank | after s | where it was | "
        "half-written checkpoint | others ended | next start went on from step | run identical |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {number} | {_row(kill)} |" for number, kill in enumerate(kills, 1)),
        "",
    ]
    file.write_text("\n".join(lines), encoding="utf-8")


def _row(kill: Kill) -> str:
    cells = [
        kill.run,
        kill.ranks,
        kill.workers,
        kill.start,
        kill.rank,
        f"{kill.moment_s:.2f}",
        kill.place,
        "yes" if kill.half_written else "",
        ", ".join(_ENDED.get(code, str(code)) for code in kill.others),
        kill.goes_on,
        "yes" if kill.identical else "**NO**",
    ]
    return " | ".join(str(cell) for cell in cells)


def _inside(place: str) -> str:
    phase = place.partition(", ")[2]
    return phase or ("between phases of a step" if step_of(place) else "start")


def _counts(values: Iterable[object]) -> str:
    found = Counter(str(value) for value in values)
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items())) or "-"
