"""What it costs to open an epoch in its middle, in each order: `python -m tests.benchmarks.order`.

A million images, 512 ranks, 8 decoding processes each. Every number is of a fresh process, started as decoding
processes are; seconds are its own processor time, since other work must not count, and memory is the peak of its
resident set beyond what it had before. The rank makes the order and takes its
columns of it; a decoding process gets the rank's part and makes the rows, weights and labels of its steps. The last
line is the usual way, torch's DistributedSampler, which makes the rank's part of a whole epoch, once and in one order.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DistributedSampler

from shards import samples, stream
from shards.checksums import SHA256_BYTES, XXH3_BYTES
from shards.manifest import read_manifest, write_manifest
from shards.plan import worker_batches
from shards.subset import with_fraction
from shards.workers import start_server

LABELS = [f"finding_{k}" for k in range(10)]
IMAGES_PER_SHARD = 500
EXAM_SIZES = [4] * 14 + [2, 3, 5, 6, 1, 8]
ORDERS: dict[str, dict[str, Any]] = {
    "uniform, pad": {},
    "uniform, drop": {"last_batch": "drop"},
    "uniform, wrap": {"last_batch": "wrap"},
    "class_balanced": {"sampling": "class_balanced"},
    "by exam": {"group_by": "exam"},
    "half of the patients": {"fraction": 0.5},
}
LIMIT_S, LIMIT_MB, LIMIT_STEP_MS = 1.0, 100.0, 1.0


@dataclass
class Cost:
    """Seconds, and MB of resident memory beyond what was there before."""

    seconds: float = 0.0
    memory_mb: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Fill in what the block costs this process."""
    cost = Cost()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before_kb = _status_kb("VmRSS")
    start_s = time.process_time()
    yield cost
    cost.seconds = time.process_time() - start_s
    cost.memory_mb = (_status_kb("VmHWM") - before_kb) / 1e3


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make_folder(folder: Path, images: int) -> None:
    """A manifest without tars: exams of one to eight images, ten labels from 1 in 4 to 1 in 2048."""
    rng = np.random.default_rng(0)
    row_N = np.arange(images)
    exam_N = np.repeat(row_N, np.resize(EXAM_SIZES, images))[:images]
    label_NK = (rng.random((images, len(LABELS))) < 0.5 ** np.arange(2, 2 + len(LABELS))).astype(np.int8)
    columns: dict[str, Any] = {f"label_{name}": pa.array(label_NK[:, k]) for k, name in enumerate(LABELS)}
    for name, number_N in (("key", row_N), ("image_id", row_N), ("exam_id", exam_N), ("patient_id", exam_N // 2)):
        columns[name] = pc.binary_join_element_wise(f"a-{name}-of-usual-length-", pc.cast(number_N, pa.string()), "")
    columns["shard"] = pa.array((row_N // IMAGES_PER_SHARD).astype(np.int32))
    columns["offset_bytes"] = pa.array(row_N % IMAGES_PER_SHARD * 1_000_000)
    for name, size in (("sha256", SHA256_BYTES), ("xxh3", XXH3_BYTES)):
        data = pa.py_buffer(rng.bytes(images * size))
        columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), images, [None, data])
    columns["split"] = pa.array(["train"]).take(pa.array(np.zeros(images, np.int32)))
    schema = samples.schema(LABELS, encoded=False)
    fill = {pa.string(): "", pa.int64(): 1_000_000, pa.bool_(): False}
    for field in schema:
        if field.name == "boxes":
            columns["boxes"] = pa.array([[]], field.type).take(pa.array(np.zeros(images, np.int32)))
        elif field.name not in columns:
            value = pa.array([fill.get(field.type, 1)], field.type)
            columns[field.name] = value.take(pa.array(np.zeros(images, np.int32)))
    count = -(-images // IMAGES_PER_SHARD)
    shards = [{"name": f"{s:06d}.tar", "num_bytes": 1, "sha256": "0" * 64, "num_samples": 1} for s in range(count)]
    fields: dict[str, Any] = {
        "name": "benchmark", "labels": LABELS, "height_px": 1520, "width_px": 912, "dtype": "uint8", "codec": "png",
        "recipe": {}, "fingerprint": "f", "settings": {}, "counts": {}, "dropped": [], "notes": {}, "shards": shards,
    }  # fmt: skip
    write_manifest(folder, pa.table([columns[field.name] for field in schema], schema=schema), fields)


def choose(folder: Path, words: dict[str, Any]) -> dict[str, Any]:
    """Choose the patients that train, as each rank does once when it starts, and write down the choice."""
    manifest = read_manifest(folder)
    with measured() as choosing:
        manifest = with_fraction(manifest, fraction=words.get("fraction", 1), seed=0, labels=LABELS)
    (folder / "manifest").write_bytes(pickle.dumps(manifest))
    return vars(choosing)


def open_rank(folder: Path, words: dict[str, Any], world: int, batch_size: int) -> dict[str, Any]:
    """Open an epoch in its middle as a rank does, and write down what each decoding process would be sent."""
    order = {"seed": 10, "epoch": 7, "batch_size": batch_size, "last_batch": "pad", "block_shards": 16}
    order |= {key: value for key, value in words.items() if key != "fraction"}
    manifest = pickle.loads((folder / "manifest").read_bytes())
    middle = len(manifest.rows("train")) // batch_size // 2
    sent: list[Any] = []
    with mock.patch.object(stream, "_serve", lambda share, **_: sent.append(share)), measured() as opening:
        stream.train_stream(
            manifest,
            labels=LABELS,
            **order,
            accumulation=1,
            world=world,
            rank=world // 3,
            start_batch=middle,
            workers=8,
            prefetch_batches=2,
            pin_memory=False,
        )
    (folder / "share").write_bytes(pickle.dumps(sent[0]))
    return {"opening": vars(opening), "steps": middle + sent[0].num_batches}


def open_worker(folder: Path) -> dict[str, Any]:
    """Open an epoch as a decoding process does, and make the indices of its steps."""
    with measured() as opening:
        share = pickle.loads((folder / "share").read_bytes())
        batches = share._numbers(worker_batches(share.num_batches, 0, 8, 3))
        share._batch(None, None, next(batches), None)
    times = []
    while True:
        start_s = time.process_time()
        numbers = next(batches, None)
        if numbers is None:
            break
        share._batch(None, None, numbers, None)
        times.append(time.process_time() - start_s)
    return {"opening": vars(opening), "step_ms": median(times) * 1e3, "slowest_ms": max(times) * 1e3}


def open_sampler(images: int, world: int) -> dict[str, Any]:
    """The usual way."""
    with measured() as opening:
        sampler = DistributedSampler(range(images), world, world // 3, seed=10)  # type: ignore[arg-type]
        sampler.set_epoch(7)
        list(sampler)
    return {"opening": vars(opening)}


def fresh(action: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What an action returns in a process of its own."""
    context = start_server()
    with tempfile.NamedTemporaryFile() as file:
        process = context.Process(target=_write, args=(file.name, action, arguments))
        process.start()
        process.join()
        assert process.exitcode == 0
        found: dict[str, Any] = json.loads(Path(file.name).read_text())
    return found


def _write(file: str, action: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    Path(file).write_text(json.dumps(action(*arguments)))


def line(folder: Path, name: str, world: int, batch_size: int, usual: dict[str, float]) -> str:
    """Measure one order."""
    choosing = fresh(choose, folder, ORDERS[name])
    rank = fresh(open_rank, folder, ORDERS[name], world, batch_size)
    sent_kb = (folder / "share").stat().st_size / 1e3
    worker = fresh(open_worker, folder)
    opening, decoding = rank["opening"], worker["opening"]
    ratios = f"{opening['seconds'] / usual['seconds']:5.1f} {opening['memory_mb'] / usual['memory_mb']:5.1f}"
    text = (
        f"{name:21} {rank['steps']:7} {opening['seconds']:7.2f} {opening['memory_mb']:7.0f} {ratios} {sent_kb:9.0f}"
        f" {decoding['seconds'] * 1e3:9.1f} {decoding['memory_mb']:7.1f} {worker['step_ms']:8.3f}"
    )
    if "fraction" in ORDERS[name]:
        text += f"  (once per start, choosing them: {choosing['seconds']:.1f} s, {choosing['memory_mb']:.0f} MB)"
    seconds, memory_mb = (max(opening[key], decoding[key]) for key in ("seconds", "memory_mb"))
    kept = seconds < LIMIT_S and memory_mb < LIMIT_MB and worker["step_ms"] < LIMIT_STEP_MS
    return text if kept else f"{text}  beyond {LIMIT_S:g} s, {LIMIT_MB:g} MB or {LIMIT_STEP_MS:g} ms"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1024, help="images of a global batch")
    args = parser.parse_args(argv)
    print(
        f"{args.images} images, {args.ranks} ranks x 8 decoding processes, global batches of {args.batch_size}\n"
        f"{'':21} {'':7} {'rank opens':>15} {'x usual':>11} {'sent':>9} {'decoding process opens':>17} {'step':>8}\n"
        f"{'order':21} {'steps':>7} {'s':>7} {'MB':>7} {'s':>5} {'MB':>5} {'kB':>9} {'ms':>9} {'MB':>7} {'ms':>8}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh(_make, folder, args.images)
        usual = fresh(open_sampler, args.images, args.ranks)["opening"]
        for order in ORDERS:
            print(line(folder, order, args.ranks, args.batch_size, usual), flush=True)
        print(f"{'DistributedSampler':21} {'':7} {usual['seconds']:7.2f} {usual['memory_mb']:7.0f}")


def _make(folder: Path, images: int) -> dict[str, Any]:
    make_folder(folder, images)
    return {}


if __name__ == "__main__":
    from tests.benchmarks.order import main as run  # functions of __main__ cannot be sent to another process

    run()
