"""`msmil bench loader`: images per second and core of each codec, beside the bare decoding of the same bytes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from msmil.config import Config, DataConfig
from msmil.config_io import load_config
from msmil.engine.bench.clock import seconds
from msmil.engine.bench.images import DIFFERENT, draw, pack_images
from shards.checksums import xxh3
from shards.codecs import CODECS, Codec, Pixels, decode
from shards.errors import UserError
from shards.files import human_bytes
from shards.host_memory import keep_freed_memory
from shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from shards.reader import ShardReader
from shards.slots import slots_for
from shards.stream import train_stream
from shards.tables import aligned

_CPU = torch.device("cpu")
_PREFETCH = 2
_WARM_UP = slots_for(_PREFETCH)  # batches until a decoding process has written to all of its memory once
_BATCHES = _WARM_UP + 16  # at least, so that it is measured in its stride


def subject(text: str, overrides: Sequence[str]) -> Config:
    """The configuration that is named, or one for the packed folder that is."""
    if not Path(text).is_dir():
        return load_config(text, overrides)
    if overrides:
        fix = "leave them out, or name an experiment (its data.shards are read)"
        raise UserError(f"options {' '.join(overrides)} beside a packed folder", fix=fix, file=text)
    if not (Path(text) / MANIFEST_NAME).exists():
        raise UserError("is no packed folder (no manifest.json)", file=text, fix="name one, or an experiment")
    return Config(data=DataConfig(shards=text, labels=tuple(read_manifest(text).labels[:1])))


def bench_loader(
    config: Config, size_hw: tuple[int, int] | None, *, images: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure each codec on the same images, `say` a table, and return everything by name.

    Decoding alone is the limit, with as many images kept as the stream keeps: where each is written over the one
    before it ("in one place"), it stays in the processor's caches, as no image of a batch can. Beside it in the same
    rounds: the stream of training in this process (both in this process's processor time, and of that the checksums),
    and from one decoding process (both by the clock on the wall), both once their memory is in use. This process keeps
    freed memory as decoding processes do. What is told is the median of the rounds; shares are taken within a round
    first, since a busy machine is slower in some than in others.

    Raises:
        UserError: the data cannot be read, or hold too few images.
    """
    keep_freed_memory()
    size = config.train.batch_size
    number = max(_BATCHES, -(-images // size)) * size
    chosen = list(_images(config, size_hw, number))
    height, width = chosen[0].shape
    say(f"{number} images of {height} x {width} pixels, {chosen[0].dtype}, batches of {size}, {rounds} rounds in turn")
    say("each number is the median of the rounds, and each share that of the rounds' own shares")
    found: dict[str, Any] = {"image_hw": [height, width], "images": number, "batch_size": size, "codecs": {}}
    for codec in CODECS:
        with TemporaryDirectory(prefix="msmil_bench_") as folder:
            manifest = pack_images(Path(folder), chosen, codec=codec, labels=config.data.labels, number=number)
            found["codecs"][codec] = _measure(manifest, codec, size=size, rounds=rounds)
    for line in _table(found["codecs"]):
        say(line)
    return found


def _images(config: Config, size_hw: tuple[int, int] | None, number: int) -> Iterator[Pixels]:
    if size_hw is not None:
        yield from (draw(size_hw, seed) for seed in range(min(number, DIFFERENT)))
        return
    manifest = read_manifest(config.data.shards)
    rows = manifest.rows("train").tolist()
    if not rows:
        raise UserError("has no training images", file=manifest.directory, fix="name other data, or use --synthetic")
    with ShardReader(manifest) as reader:
        yield from (reader.read(row) for row in rows[:number])


def _measure(manifest: Manifest, codec: Codec, *, size: int, rounds: int) -> dict[str, float]:
    payloads = _payloads(manifest)
    hw = (manifest.height_px, manifest.width_px)

    def bare(kept: int) -> None:
        images: deque[Pixels] = deque(maxlen=kept)
        for data in payloads:
            images.append(decode(data, codec, expect_hw=hw, dtype=manifest.dtype, name="a payload"))

    def stream(workers: int) -> Iterator[Any]:
        return train_stream(
            manifest,
            labels=manifest.labels,
            seed=0,
            epoch=0,
            batch_size=size,
            accumulation=1,
            world=1,
            rank=0,
            start_batch=0,
            last_batch="drop",
            block_shards=16,
            workers=workers,
            prefetch_batches=_PREFETCH,
            pin_memory=False,
        )

    def checksums() -> None:
        for data in payloads:
            xxh3(data)

    def stream_s(workers: int, clock: Callable[[], float]) -> float:
        """Seconds per image of the stream, between its first batches and its last."""
        batches = stream(workers)
        for _ in range(_WARM_UP):
            next(batches)
        start_s = last_s = clock()
        images = 0
        for batch in batches:
            last_s = clock()
            images += len(batch.sample_B)
        return (last_s - start_s) / images

    kept = slots_for(0) * size
    bare(kept)
    number = len(payloads)
    rows = []
    for _ in range(rounds):
        alone, hashed, one_place = (seconds(run, _CPU) for run in (lambda: bare(kept), checksums, lambda: bare(0)))
        each = [x_s / number for x_s in (alone.work, alone.wall, one_place.work, hashed.work)]
        rows.append((*each, stream_s(0, time.process_time), stream_s(1, time.perf_counter)))
    bare_s, bare_wall_s, one_place_s, checksum_s, here_s, worker_s = (median(x) for x in zip(*rows, strict=True))
    return {
        "bytes_per_image": sum(map(len, payloads)) / number,
        "bare_per_s": 1 / bare_s,
        "bare_in_one_place_per_s": 1 / one_place_s,
        "in_process_per_s": 1 / here_s,
        "in_process_of_limit": median(row[0] / row[4] for row in rows),
        "checksum_share": checksum_s / here_s,
        "bare_per_s_wall": 1 / bare_wall_s,
        "one_worker_per_s": 1 / worker_s,
        "one_worker_of_limit": median(row[1] / row[5] for row in rows),
    }


def _payloads(manifest: Manifest) -> list[bytes]:
    """The encoded bytes of all rows."""
    found = []
    for row in range(len(manifest)):
        shard, offset, num_bytes, *_ = manifest.location(row)
        descriptor = os.open(manifest.directory / manifest.shards[shard].name, os.O_RDONLY)
        try:
            found.append(os.pread(descriptor, num_bytes, offset))
        finally:
            os.close(descriptor)
    return found


def _table(codecs: dict[str, dict[str, float]]) -> list[str]:
    heads = (
        "images/s and core",
        "per image",
        "in one place",
        "bare decode",
        "stream",
        "of it",
        "not decode",
        "checksum",
    )
    rows = [[*heads, "one process", "of it"]]
    for codec, value in codecs.items():
        rows.append(
            [
                codec,
                human_bytes(int(value["bytes_per_image"])),
                f"{value['bare_in_one_place_per_s']:.1f}",
                f"{value['bare_per_s']:.1f}",
                f"{value['in_process_per_s']:.1f}",
                f"{value['in_process_of_limit']:.0%}",
                f"{max(0.0, 1 - value['in_process_of_limit']):.0%}",
                f"{value['checksum_share']:.0%}",
                f"{value['one_worker_per_s']:.1f}",
                f"{value['one_worker_of_limit']:.0%}",
            ]
        )
    return aligned(rows)
