"""Whether training waits for a network: `python -m tests.benchmarks.streaming`.

A loop takes batches of full-size images and does nothing for the time of a step. The same order comes from a folder on
the disk (the baseline), from a web server on the loopback interface that takes its time to answer, fetched ahead and
kept in the cache, and, to show what that is good for, from the same server without being fetched ahead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np

from shards import share, stream
from shards.manifest import Manifest, read_manifest
from shards.remote.folder import RemoteOptions
from shards.types import Batch
from tests.archives import LABELS, make_grouped_archive, pack_grouped
from tests.servers import FileServer, serving

HW: Final = (1520, 912)


@dataclass(frozen=True)
class Timed:
    """Seconds until the first batch; waits for each of the others, in seconds."""

    first_s: float
    wait_s: np.ndarray


def batches(manifest: Manifest, *, batch_size: int, workers: int) -> Iterator[Batch]:
    """An epoch."""
    options: dict[str, Any] = {"last_batch": "drop", "block_shards": 4, "prefetch_batches": 2, "pin_memory": False}
    place: dict[str, Any] = {"world": 1, "rank": 0, "start_batch": 0, "accumulation": 1, "seed": 0, "epoch": 0}
    return stream.train_stream(manifest, labels=LABELS, batch_size=batch_size, workers=workers, **options, **place)


def timed(loader: Iterator[Batch], step_s: float) -> Timed:
    """Go through batches with steps of `step_s` and see how long each is waited for."""
    waits = []
    start_s = time.perf_counter()
    for _ in loader:
        waits.append(time.perf_counter() - start_s)
        time.sleep(step_s)
        start_s = time.perf_counter()
    return Timed(waits[0], np.array(waits[1:]))


def row(words: str, found: Timed, baseline: Timed, server: FileServer | None, before: int) -> str:
    """A line of the table."""
    sent = [] if server is None else server.gets()[before:]
    traffic = f"{len(sent)} | {sum(one.num_bytes for one in sent) / 1e6:.0f} MB"
    ratio = found.wait_s.mean() / baseline.wait_s.mean()
    waits = f"{found.wait_s.mean() * 1e3:.1f} ms | {ratio:.2f} | {found.wait_s.max() * 1e3:.0f} ms"
    return f"| {words} | {found.first_s:.2f} s | {waits} | {traffic} |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exams", type=int, default=20, help="of four images each")
    parser.add_argument("--height", type=int, default=HW[0])
    parser.add_argument("--width", type=int, default=HW[1])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.5, help="time of a step")
    parser.add_argument("--latency-s", type=float, default=0.2, help="until the server answers a request")
    args = parser.parse_args(argv)
    how = {"batch_size": args.batch_size, "workers": args.workers}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        archive = make_grouped_archive(folder / "archive", exams=args.exams, hw=(args.height, args.width), test_share=0)
        pack_grouped(archive, folder / "shards", samples_per_shard=8)
        here = read_manifest(folder / "shards")
        print("| from | first batch | wait per step | of the baseline | longest | requests | fetched |")
        print("|---|---|---|---|---|---|---|")
        next(batches(here, **how))  # processes that decode are started from one that is there from now on
        baseline = timed(batches(here, **how), args.step_s)
        print(row("baseline: a folder on this disk", baseline, baseline, None, 0), flush=True)
        with serving(folder / "shards") as server:
            server.delay_s = args.latency_s
            there = read_manifest(server.url, RemoteOptions(cache_dir=str(folder / "a"), cache_gb=1.0))
            for words in ("a web server, the first epoch", "a web server, again: all in the cache"):
                before = len(server.gets())
                found = timed(batches(there, **how), args.step_s)
                print(row(words, found, baseline, server, before), flush=True)
            there = read_manifest(server.url, RemoteOptions(cache_dir=str(folder / "b"), cache_gb=1.0))
            before = len(server.gets())
            with mock.patch.object(share, "coming", return_value=None):
                found = timed(batches(there, **how), args.step_s)
            print(row("a web server, nothing fetched ahead", found, baseline, server, before))


if __name__ == "__main__":
    main()
