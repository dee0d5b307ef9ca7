"""A server that refuses ranges sends whole shards: the cache holds those that are read at a time, or nothing starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards.stream
from shards.cache import LEFT
from shards.errors import UserError
from shards.features import read_features
from shards.manifest import Manifest, read_manifest
from shards.reader import ShardReader
from shards.remote.folder import RemoteOptions
from shards.stream import train_stream
from shards.types import Batch
from tests.archives import LABELS
from tests.features import make_features
from tests.servers import FileServer, serving

pytestmark = pytest.mark.slow

BLOCK_SHARDS = 2
ORDER: dict[str, Any] = {"seed": 3, "batch_size": 2, "last_batch": "pad", "block_shards": BLOCK_SHARDS}
LOADING: dict[str, Any] = {"accumulation": 1, "prefetch_batches": 2, "pin_memory": False}


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving(folder) as server:
        server.mode = "refuses"
        yield server


def training(manifest: Manifest, **changes: Any) -> Iterator[Batch]:
    fields = {"labels": LABELS, "world": 1, "rank": 0, "epoch": 0, "start_batch": 0, "workers": 0} | ORDER | LOADING
    return train_stream(manifest, **(fields | changes))


def cached(tmp_path: Path, num_bytes: float) -> RemoteOptions:
    return RemoteOptions(cache_dir=str(tmp_path / "cache"), cache_gb=num_bytes / 1e9, timeout_s=2, retries=3)


def training_bytes(folder: Path) -> list[int]:
    """The sizes of the shards that training reads, the largest first."""
    manifest = read_manifest(folder)
    used = np.unique(manifest.shard_N()[manifest.rows("train")])
    return sorted((manifest.shards[shard].num_bytes for shard in used), reverse=True)


def enough(folder: Path, together: int) -> float:
    """Room for so many shards, and for the one that comes when an eviction has left but a share of the bound."""
    return sum(training_bytes(folder)[: together + 1]) / LEFT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_of_two_blocks_of_the_shuffle_downloads_each_shard_once_an_epoch(
    folder: Path, server: FileServer, tmp_path: Path, workers: int
) -> None:
    """One block is read while the next one comes, in every epoch, though the cache holds not half of the shards."""
    options = cached(tmp_path, enough(folder, 2 * BLOCK_SHARDS) + 1)
    assert options.limit_bytes < 0.5 * sum(training_bytes(folder))
    manifest = read_manifest(server.url, options)
    for epoch in range(4):
        before = len(server.gets())
        for _ in training(manifest, epoch=epoch, workers=workers):
            assert manifest.remote.cache().held_bytes() <= options.limit_bytes
        sent = Counter(sent.name for sent in server.gets()[before:])
        assert sent
        assert set(sent.values()) == {1}


def test_a_smaller_cache_is_refused_before_a_shard_is_downloaded(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    manifest = read_manifest(server.url, cached(tmp_path, enough(folder, 2 * BLOCK_SHARDS) - 1000))
    with pytest.raises(UserError) as caught:
        training(manifest)
    thing = (
        r"refuses ranges.* the cache of \d+\.\d kB does not hold the 4 that are read at a time \(\d+\.\d kB are needed"
    )
    assert caught.match(thing)
    assert caught.value.fix == "set data.cache_gb to 0.1 or more"
    assert caught.value.file == str(tmp_path / "cache")
    assert not server.gets()


def test_what_is_refused_would_download_shards_again_and_again(
    folder: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.stream, "check_whole_shards", lambda *_: None)
    manifest = read_manifest(server.url, cached(tmp_path, 2 * training_bytes(folder)[0]))
    list(training(manifest, batch_size=1, block_shards=6))
    assert len(server.gets()) > 2 * len(training_bytes(folder))


def test_who_reads_waits_for_the_room_that_others_are_fetching_into(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    manifest = read_manifest(server.url, cached(tmp_path, training_bytes(folder)[0]))
    assert manifest.remote is not None
    cache, other = manifest.remote.cache(), b"o" * 32
    claim = cache.claim(other, cache.limit_bytes, wait=False)
    assert claim is not None
    assert cache.reserve([claim])
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(ShardReader(manifest).read, 0)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.5)
        claim.publish()
        np.testing.assert_array_equal(reading.result(timeout=60), ShardReader(read_manifest(folder)).read(0))
    assert not cache.has(other), "it made room"


def test_a_shard_that_is_larger_than_the_cache_is_named(folder: Path, server: FileServer, tmp_path: Path) -> None:
    manifest = read_manifest(server.url, cached(tmp_path, training_bytes(folder)[-1] - 1))
    thing = r"this shard of \d+ bytes finds no room in the cache of \d+ bytes"
    with pytest.raises(UserError, match=f"shard-000000.tar: {thing}. Fix: set data.cache_gb to more"):
        ShardReader(manifest).read(0)


def test_draws_from_classes_need_all_shards(folder: Path, server: FileServer, tmp_path: Path) -> None:
    everything = sum(training_bytes(folder)) / LEFT
    manifest = read_manifest(server.url, cached(tmp_path, everything - 1000))
    list(training(manifest))
    with pytest.raises(UserError, match=f"the {len(training_bytes(folder))} that are read at a time"):
        training(manifest, sampling="class_balanced")
    before = len(server.gets())
    manifest = read_manifest(server.url, cached(tmp_path, everything + 1))
    list(training(manifest, sampling="class_balanced"))
    assert len(server.gets()) - before <= len(training_bytes(folder))


def test_an_exam_in_two_shards_needs_both(folder: Path, server: FileServer, tmp_path: Path) -> None:
    """Five images to a shard, four to an exam: images of a block's exams lie in shards of another one."""
    manifest = read_manifest(server.url, cached(tmp_path, enough(folder, 2 * BLOCK_SHARDS) + 1))
    list(training(manifest))
    with pytest.raises(UserError, match="the 8 that are read at a time"):
        training(manifest, group_by="exam", batch_size=4)
    before = len(server.gets())
    manifest = read_manifest(server.url, cached(tmp_path, enough(folder, 4 * BLOCK_SHARDS) + 1))
    list(training(manifest, group_by="exam", batch_size=4))
    assert len(server.gets()) - before <= len(training_bytes(folder))


def test_features_need_the_tars_in_which_those_of_two_blocks_lie(folder: Path, tmp_path: Path) -> None:
    """Eight images to a tar of features, five to a shard: a shard's features lie in one or two tars."""
    manifest = read_manifest(folder)
    made = make_features(manifest, tmp_path / "features")
    size = max(shard.num_bytes for shard in made.shards)
    with serving(tmp_path / "features") as server:
        server.mode = "refuses"
        features = read_features(server.url, cached(tmp_path, 5 * size / LEFT))
        with pytest.raises(UserError, match="the 8 that are read at a time"):
            training(manifest, features=features)
        list(training(manifest, features=read_features(server.url, cached(tmp_path, 9 * size / LEFT + 1))))


def test_where_ranges_are_served_it_is_room_for_batches_that_counts(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    server.mode = "ranges"
    manifest = read_manifest(server.url, cached(tmp_path, enough(folder, 2 * BLOCK_SHARDS) - 1000))
    assert len(list(training(manifest))) > 0
