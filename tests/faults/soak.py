"""SIGKILL of one rank at moments drawn uniformly over a run, many times: every run must end as an unbroken one.

    python -m tests.faults.soak --kills 200 --record tests/faults/soak_record.md
    python -m tests.faults.soak --kills 30 --aimed 3 --zero-stages 1 2 3

A run is started, one of its ranks is killed at a moment drawn uniformly over the seconds that an unbroken run takes
now, and it is started again until it ends. Its weights, moments and averaged weights are then compared with those of
an unbroken run, byte by byte. Ranks are real processes, forked from a launcher (tests.forked).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msmil.engine.checkpoint_state import newest
from shards.pack import pack
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table
from tests.archives import LABELS, make_grouped_archive
from tests.faults.experiments import write_full
from tests.faults.launcher import Launcher, Started, digests, half_written, kill_inside_a_save, left_behind, poll
from tests.faults.soak_record import DDP, Kill, Soak, write_record

_MEASURED_AGAIN = 15  # runs of a kind later, since the machine may be busier then
_END_S = 300.0


@dataclass(frozen=True)
class Kind:
    """What is the same in runs that are compared, and decoding processes."""

    engine: str
    ranks: int
    workers: int

    @property
    def train(self) -> dict[str, Any]:
        """Words of the train section."""
        if self.engine == DDP:
            return {}
        stage = int(self.engine[-1])
        return {"engine": "deepspeed", "zero_stage": stage} | ({"ema_decay": 0.0} if stage == 3 else {})


def kind_of(number: int, stages: Sequence[int]) -> Kind:
    """The kind of a run: under DDP on 2 or 3 ranks, some with decoding processes; or the stages of ZeRO in turn."""
    if stages:
        return Kind(f"ZeRO {stages[number % len(stages)]}", 2, 0)
    return Kind(DDP, 3 if number % 4 == 3 else 2, 1 if number % 16 == 5 else 0)


@dataclass(frozen=True)
class Whole:
    """An unbroken run: how long it takes now, and what it ends with."""

    seconds: float
    digests: dict[str, str]
    step: int


class Killer:
    """Kills and restarts runs, and keeps the books."""

    def __init__(self, launcher: Launcher, folder: Path, seed: int, stages: Sequence[int], aimed: int) -> None:
        self.launcher, self.folder, self.stages, self.aimed = launcher, folder, stages, aimed
        self.draw = random.Random(seed)
        self.soak = Soak(kills=[], ends=[], unbroken=0, left_behind=0, failed_starts=[])
        self._wholes: dict[Kind, Whole] = {}
        self._runs: Counter[Kind] = Counter()
        archive = make_grouped_archive(folder / "archive", exams=24)
        rows = read_grouped_table(archive.table, archive.images)
        self.packed = folder / "shards"
        pack(rows, self.packed, recipe=AsIs(), labels=LABELS, samples_per_shard=12, processes=1, quiet=True)

    def run(self, number: int, kills: int) -> None:
        """One run, killed until it ends, or, once `kills` have struck in all, left alone."""
        kind = kind_of(number, self.stages)
        whole = self.whole(kind)
        name = f"run_{number}"
        config = write_full(self.folder, self.packed, name, train=kind.train)
        checkpoints = self.folder / "runs" / name / "checkpoints"
        own: list[Kill] = []
        while True:
            start = Kill(
                run=number,
                engine=kind.engine,
                ranks=kind.ranks,
                workers=kind.workers,
                start=step_saved(checkpoints),
            )
            started = self.launcher.start(config, f"data.workers={kind.workers}", ranks=kind.ranks)
            struck = None
            if not own and number < self.aimed:
                struck = aimed_at_a_save(started, checkpoints, start)
            elif len(self.soak.kills) + len(own) < kills:
                struck = self.strike(started, whole.seconds, start)
            codes = self.launcher.wait(started, deadline_s=_END_S)
            self.count_left_behind(started)
            if struck is None or codes[struck.rank] != -signal.SIGKILL:
                if any(codes):
                    self.soak.failed_starts.append(f"run {number}: {codes}: {started.said()[-500:]}")
                    continue
                break
            others = [rank for rank in range(kind.ranks) if rank != struck.rank]
            own.append(
                replace(
                    struck,
                    others=tuple(codes[rank] for rank in others),
                    traceback=any("Traceback" in started.said(rank) for rank in others),
                    half_written=bool(half_written(started, checkpoints)),
                    goes_on=step_saved(checkpoints),
                )
            )
        found = newest(checkpoints)
        assert found is not None
        same = digests(found) == whole.digests and step_saved(checkpoints) == whole.step
        self.soak.kills += [replace(kill, identical=same) for kill in own]
        self.soak.ends.append((kind.engine, same))

    def strike(self, started: Started, seconds: float, kill: Kill) -> Kill | None:
        """Kill a rank at a moment; None when the run has ended by then."""
        moment_s, rank = self.draw.uniform(0, seconds), self.draw.randrange(kill.ranks)
        time.sleep(moment_s)
        started.send(signal.SIGKILL, rank)  # nothing happens to one that has ended and is not waited for yet
        return replace(kill, rank=rank, moment_s=moment_s, place=started.place(rank))

    def whole(self, kind: Kind) -> Whole:
        """The unbroken run of a kind, measured when it was not yet, and again after some runs."""
        before = self._wholes.get(kind)
        self._runs[kind] += 1
        if before is not None and self._runs[kind] % _MEASURED_AGAIN:
            return before
        name = f"unbroken_{self.soak.unbroken}"
        begin_s = time.monotonic()
        config = write_full(self.folder, self.packed, name, train=kind.train)
        started = self.launcher.start(config, f"data.workers={kind.workers}", ranks=kind.ranks)
        codes = self.launcher.wait(started, deadline_s=_END_S)
        assert codes == [0] * kind.ranks, started.said()
        seconds = time.monotonic() - begin_s
        checkpoints = self.folder / "runs" / name / "checkpoints"
        found = newest(checkpoints)
        assert found is not None
        whole = Whole(seconds, digests(found), step_saved(checkpoints))
        for one, other in self._wholes.items():
            assert (one.engine, one.ranks) != (kind.engine, kind.ranks) or (whole.digests, whole.step) == (
                other.digests,
                other.step,
            )
        self.soak.unbroken += 1
        self._wholes[kind] = whole
        return whole

    def count_left_behind(self, started: Started) -> None:
        """Processes that are still there some seconds after the ranks."""
        try:
            poll(lambda: left_behind(started) == [], deadline_s=15, every_s=0.05)
        except AssertionError:
            self.soak.left_behind += len(left_behind(started))


def aimed_at_a_save(started: Started, checkpoints: Path, kill: Kill) -> Kill:
    """Kill rank 0 while a checkpoint lies there half-written."""
    kill_inside_a_save(started, checkpoints, deadline_s=_END_S)
    return replace(kill, rank=0, moment_s=time.time() - started.since_s, place=started.place(0), aimed=True)


def step_saved(checkpoints: Path) -> int:
    """The step that the newest checkpoint's state names; 0 where there is none."""
    found = newest(checkpoints)
    return 0 if found is None else int(json.loads((found / "state.json").read_text())["train_state"]["step"])


def main(argv: list[str] | None = None) -> int:
    """Soak, and write the record after every run; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description="kill ranks at random moments; every run must end unchanged")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--record", type=Path, default=Path("tests/faults/soak_record.md"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[], help="under DeepSpeed, these in turn")
    parser.add_argument("--aimed", type=int, default=0, help="first kills of so many runs that strike inside a save")
    args = parser.parse_args(argv)
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        killer = Killer(Launcher(Path(name) / "worlds"), Path(name), args.seed, args.zero_stages, args.aimed)
        for number in itertools.count():
            killer.run(number, args.kills)
            soak = killer.soak
            command = f"python -m tests.faults.soak --kills {args.kills} --seed {args.seed}"
            command += f" --aimed {args.aimed}" if args.aimed else ""
            if args.zero_stages:
                command += f" --zero-stages {' '.join(map(str, args.zero_stages))}"
            write_record(args.record, soak, command=command, seconds=time.monotonic() - begin_s)
            print(f"{len(soak.kills)} kills, {soak.identical} of {soak.runs} runs identical", flush=True)
            if len(soak.kills) >= args.kills:
                break
    return 0 if soak.identical == soak.runs and soak.left_behind == 0 and not soak.failed_starts else 1


if __name__ == "__main__":
    sys.exit(main())
