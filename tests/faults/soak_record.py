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

_PACKAGES = ("torch", "accelerate", "deepspeed", "timm", "safetensors")
DDP = "DDP"
_ZERO_HEADING = "## The same under DeepSpeed's ZeRO"  # its part of the file, behind the one of DDP
_SETTINGS = {
    True: "DDP over gloo, with dropout, augmentation, averaged weights and 2 accumulation steps",
    False: "DeepSpeed over gloo, its stages in turn, with dropout, augmentation, averaged weights\n"
    "(not under stage 3) and 2 accumulation steps",
}
_WORDS = """\
SIGKILL of one rank, drawn at random, at a moment drawn uniformly over the seconds that an unbroken run takes; then the
same command again, until the run ends. SETTINGS,
a save every 2 steps. Compared are the bytes of weights, moments and averaged weights. When a rank has died, the
launcher sends SIGTERM to the others, as torchrun does: they end by that signal (while they start, or once they have
noticed that the connection to the dead rank broke and wait for their launcher) or by themselves, with exit code 1; by
SIGKILL those that have not ended half a minute later. Step 0 is a start from scratch."""
_ENDED = {1: "by itself", -15: "by SIGTERM", -9: "by SIGKILL"}


@dataclass(frozen=True)
class Kill:
    """One kill: of which start, when, where the rank was, how the others ended, what was left on the disk.

    start, goes_on: the steps that the killed start and the one behind it went on from, 0 for a fresh one.
    traceback: whether another rank printed one; aimed: whether it was not drawn, but waited for a save.
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
    traceback: bool = False
    aimed: bool = False
    identical: bool = False
    engine: str = DDP


@dataclass
class Soak:
    """What was counted; `ends` has the engine of each run, and whether it ended as the unbroken one."""

    kills: list[Kill]
    ends: list[tuple[str, bool]]
    unbroken: int
    left_behind: int
    failed_starts: list[str]

    @property
    def engines(self) -> set[str]:
        """Those that were soaked."""
        return {engine for engine, _ in self.ends}

    @property
    def runs(self) -> int:
        """How many were killed until they ended."""
        return len(self.ends)

    @property
    def identical(self) -> int:
        """How many of them ended as the unbroken one."""
        return sum(same for _, same in self.ends)


def write_record(file: Path, soak: Soak, *, command: str, seconds: float) -> None:
    """Write the record as Markdown; one of DDP leaves that of ZeRO in the file, and the other way round."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    ddp, _, zero = before.partition(_ZERO_HEADING)
    if soak.engines <= {DDP}:
        ddp = f"# A soak: one rank killed, again and again\n{record(soak, command, seconds)}"
    else:
        zero = f"\n{record(soak, command, seconds)}"
    file.write_text(ddp.strip() + (f"\n\n{_ZERO_HEADING}{zero}" if zero else "\n"), encoding="utf-8")


def record(soak: Soak, command: str, seconds: float) -> str:
    """What was run, what was counted, and each kill."""
    kills = soak.kills
    totals = [
        ("kills", len(kills)),
        ("runs, each killed until it ended", soak.runs),
        ("of them bit-identical to the unbroken run", f"**{soak.identical} of {soak.runs}**"),
        *((f"of {engine}: kills; runs bit-identical", _of_engine(soak, engine)) for engine in sorted(soak.engines)),
        ("unbroken runs, all of one engine and number of ranks identical", soak.unbroken),
        ("kills of a world of 2 ranks, of 3 ranks", _counts(kill.ranks for kill in kills)),
        ("kills with a decoding process per rank", sum(kill.workers > 0 for kill in kills)),
        ("kills of rank 0, 1, 2", _counts(kill.rank for kill in kills)),
        ("where the killed rank was", _counts(_inside(kill.place) for kill in kills)),
        ("kills inside a save, or that left a half-written checkpoint", sum(map(_in_a_save, kills))),
        ("kills that were not drawn, but waited for a half-written checkpoint", sum(kill.aimed for kill in kills)),
        ("kills that left a half-written checkpoint", sum(kill.half_written for kill in kills)),
        ("how the other ranks ended", _counts(_ENDED.get(code, str(code)) for kill in kills for code in kill.others)),
        ("kills behind which another rank printed a traceback", sum(kill.traceback for kill in kills)),
        ("kills behind which the run went on from a checkpoint", sum(kill.goes_on > 0 for kill in kills)),
        ("processes left behind", soak.left_behind),
        ("starts that failed without a kill", len(soak.failed_starts)),
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    lines = [
        "",
        f"`{command}`: {seconds / 60:.0f} minutes on "
        f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, {versions}.",
        "",
        _WORDS.replace("SETTINGS", _SETTINGS[soak.engines <= {DDP}]),
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
    return "\n".join(lines)


def _of_engine(soak: Soak, engine: str) -> str:
    ends = [same for one, same in soak.ends if one == engine]
    return f"{sum(kill.engine == engine for kill in soak.kills)}; {sum(ends)} of {len(ends)}"


def _in_a_save(kill: Kill) -> bool:
    return kill.half_written or _inside(kill.place) == "save"


def _row(kill: Kill) -> str:
    cells = [
        kill.run,
        kill.ranks if kill.engine == DDP else f"{kill.ranks}, {kill.engine}",
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
