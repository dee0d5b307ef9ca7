"""Encoding a packed folder once: the frozen backbone on every image, on all ranks, into shards of features.

B images, N tiles, h w size of a map.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from msmil.config import Config
from msmil.engine.feature_sizes import Sizes, measure, summary, table
from msmil.engine.features import encoder_identity, tiling_identity
from msmil.engine.pipeline import Pipeline, open_pipeline
from msmil.engine.run import make_network
from msmil.engine.runtime import Runtime
from msmil.models.mil import MILModel
from shards.errors import UserError
from shards.feature_codec import FeatureType
from shards.feature_pack import FeatureJob, finish, is_finished, write_shard
from shards.features import ROWS_NAME, SCHEMA_VERSION, WORK_FOLDER, Features, read_features
from shards.files import free_bytes, human_bytes
from shards.manifest import MANIFEST_NAME
from shards.progress import Progress, progress
from shards.stream import evaluation_stream
from shards.work import check_same, locked, start_or_resume

_EXPLAINED: Final = {"encoder": "the encoder has other weights or options now"}
_PROBES: Final = 4
_LOOK_EVERY_S: Final = 0.2
_MARGIN: Final = 1.05  # the probes are a sample


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How features are stored: type, compression, images of a tar (filled up to whole batches)."""

    dtype: FeatureType
    zstd: bool
    images_per_shard: int


def extract(
    config: Config, out: Path, runtime: Runtime, storage: Storage, *, only_sizes: bool = False, as_json: bool = False
) -> None:
    """Encode every image of data.shards with the backbone in eval mode, and write its levels to `out`.

    Arithmetic is fp32 whatever train.precision is, without TF32. The batches that the backbone sees are the same on
    any number of ranks, and a CPU rank computes in one thread, since convolutions on more add up in another order: on
    one kind of device the bytes are the same for any number of ranks. A shard that is whole is kept: the same call
    after a kill goes on where it stopped, and after the end it changes nothing.

    Args:
        config: the experiment; its augmentation has no part in this.
        out: the folder to fill; created where it is missing.
        runtime: this process among the others.
        storage: how features are stored.
        only_sizes: print what they would take, and stop.
        as_json: print that as JSON.

    Raises:
        UserError: something about data, folder, disk or a number that cannot be stored that the user can mend.
    """
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)
    pipeline = open_pipeline(replace(config, data=replace(config.data, features="")), runtime)
    network = make_network(pipeline, pretrained=True).eval()
    sizes = _measured(pipeline, network)
    if runtime.is_main and (only_sizes or not runtime.quiet):
        images = len(pipeline.manifest)
        text = table(sizes, images, storage.dtype, zstd=storage.zstd)
        print(json.dumps(summary(sizes, images), indent=2) if as_json else text, flush=True)
    if only_sizes:
        return
    job, fields = _job(pipeline, network, out, storage, sizes)
    with ExitStack() as stack:
        left: list[int] = []

        def prepare() -> None:
            left.extend(_prepare(stack, job, fields, sizes))

        def end() -> None:
            if not (job.out / MANIFEST_NAME).exists():
                finish(job, fields)
            shutil.rmtree(out / WORK_FOLDER)

        runtime.on_main(prepare)
        left = runtime.gather(left)[0]
        _write(pipeline, network, job, left, sizes.of(storage.dtype, zstd=storage.zstd))
        runtime.barrier()
        runtime.on_main(end)
    if runtime.is_main and not runtime.quiet:
        print(f"{out} holds the features of {len(job.manifest)} images; train from it with data.features={out}")


def _measured(pipeline: Pipeline, network: MILModel) -> Sizes:
    """The sizes of a few images spread over the folder; all ranks encode them, so that all know the levels."""
    rows = np.unique(np.linspace(0, len(pipeline.manifest) - 1, _PROBES).round().astype(np.int64))
    images = [{level: x[0] for level, x in levels.items()} for levels in _encoded(pipeline, network, rows, size=1)]
    return measure(pipeline.manifest, images, rows)


def _job(
    pipeline: Pipeline, network: MILModel, out: Path, storage: Storage, sizes: Sizes
) -> tuple[FeatureJob, dict[str, Any]]:
    """The extraction, and the fields of its manifest."""
    config, manifest = pipeline.config, pipeline.manifest
    batch = config.evaluate.batch_size
    images_per_shard = -(-storage.images_per_shard // batch) * batch
    fields = {
        "levels": {str(level): list(shape) for level, shape in sizes.shapes.items()},
        "encoder": encoder_identity(config.model, network.backbone),
        "bags": tiling_identity(config.bags),
        "data": {"name": manifest.header.name, "fingerprint": manifest.header.fingerprint},
        "settings": {"batch_size": batch, "images_per_shard": images_per_shard},
    }
    settings = {**fields, "dtype": storage.dtype, "zstd": storage.zstd}
    job = FeatureJob(
        out=out,
        manifest=manifest,
        dtype=storage.dtype,
        zstd=storage.zstd,
        images_per_shard=images_per_shard,
        settings=hashlib.sha256(json.dumps([SCHEMA_VERSION, settings], sort_keys=True).encode()).hexdigest(),
    )
    return job, fields


def _prepare(stack: ExitStack, job: FeatureJob, fields: dict[str, Any], sizes: Sizes) -> list[int]:
    """Lock the folder, see that it is ours and large enough, and say which shards are left to write."""
    work = job.out / WORK_FOLDER
    stack.enter_context(locked(work, verb="extracts"))
    settings = {**fields, "dtype": job.dtype, "zstd": job.zstd}
    if (job.out / MANIFEST_NAME).exists():
        check_same(job.out, _settings_of(read_features(job.out)), settings, explained=_EXPLAINED, made="extracted")
        return []
    start_or_resume(work, settings, rows_name=ROWS_NAME, explained=_EXPLAINED)
    left = job.left()
    job.forget(left)
    images = sum(len(job.rows(shard)) for shard in left)
    needed = round(images * sizes.of(job.dtype, zstd=job.zstd) * _MARGIN)
    free = free_bytes(job.out)
    if free < needed:
        thing = f"the disk is too small: about {human_bytes(needed)} are needed, {human_bytes(free)} are free"
        fix = "make room, choose a folder on another disk, or store less (--dtype bf16, --zstd)"
        raise UserError(thing, fix=fix, file=job.out)
    return left


def _settings_of(features: Features) -> dict[str, Any]:
    names = ("levels", "encoder", "bags", "data", "settings", "dtype", "zstd")
    return {name: getattr(features.header, name) for name in names}


def _write(pipeline: Pipeline, network: MILModel, job: FeatureJob, left: list[int], image_bytes: int) -> None:
    """Write this rank's part of the shards that are left."""
    runtime = pipeline.runtime
    mine = left[runtime.rank :: runtime.world]
    others = [shard for shard in left if shard not in mine]
    rows = np.concatenate([np.array(job.rows(shard), np.int64) for shard in mine] or [np.empty(0, np.int64)])
    total = len(job.manifest)
    with progress(total, "encoding", "images", quiet=runtime.quiet or not runtime.is_main) as bar:
        bar.update(total - sum(len(job.rows(shard)) for shard in left))
        counted = _Counted(bar, job, others)
        batches = counted.over(_encoded(pipeline, network, rows, size=pipeline.config.evaluate.batch_size))
        for shard in mine:
            write_shard(job, shard, batches, image_bytes * len(job.rows(shard)))
        counted.wait_for_others()


class _Counted:
    """Counts this rank's images one batch at a time, and the other ranks' when a shard of theirs is whole."""

    def __init__(self, bar: Progress, job: FeatureJob, others: list[int]) -> None:
        self._bar, self._job, self._others = bar, job, others

    def over(self, batches: Iterator[dict[int, Tensor]]) -> Iterator[dict[int, Tensor]]:
        """The batches, counted as they are taken."""
        for batch in batches:
            self._bar.update(len(next(iter(batch.values()))))
            self.count_others()
            yield batch

    def wait_for_others(self) -> None:
        """Look at the folder until all is there: a collective would time out where one device is slower by minutes."""
        self.count_others()
        while self._others:
            time.sleep(_LOOK_EVERY_S)
            self.count_others()

    def count_others(self) -> None:
        """Count what the other ranks have finished since the last time."""
        finished = [shard for shard in self._others if is_finished(self._job, shard)]
        self._others = [shard for shard in self._others if shard not in finished]
        self._bar.update(sum(len(self._job.rows(shard)) for shard in finished))


def _encoded(pipeline: Pipeline, network: MILModel, rows: np.ndarray, *, size: int) -> Iterator[dict[int, Tensor]]:
    """The levels of these rows in batches of `size`: {level: [B, N, ...]}, float32 on the CPU."""
    config, device = pipeline.config, pipeline.runtime.device
    stream = evaluation_stream(
        pipeline.manifest,
        labels=pipeline.labels,
        rows=rows,
        batch_size=size,
        workers=config.data.workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=device.type == "cuda",
        node_ranks=pipeline.runtime.node_ranks,
    )
    for batch in stream:
        bag = pipeline.bag(batch, epoch=None)
        assert bag is not None
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            levels = network.encode(bag.tiles_BNCPP)
        yield {level: encoded.x_MX.unflatten(0, encoded.bags_tiles).cpu() for level, encoded in levels.items()}
