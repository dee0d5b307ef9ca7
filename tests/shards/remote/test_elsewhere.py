"""A packed folder on a web server is read as one on this disk, whatever the network does."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.cache import Cache
from shards.errors import UserError
from shards.feature_verify import verify_features
from shards.features import read_features
from shards.manifest import Manifest, check_shards, read_manifest
from shards.plan import rank_columns
from shards.reader import ShardReader
from shards.remote.coming import Coming
from shards.remote.folder import RemoteOptions
from shards.stream import evaluation_stream, train_plan, train_stream
from shards.types import Batch
from tests.archives import LABELS
from tests.elsewhere import only, times_sent
from tests.features import make_features
from tests.servers import FileServer, serving
from tests.worlds import wait_for

pytestmark = pytest.mark.slow

ORDER: dict[str, Any] = {"seed": 3, "epoch": 1, "batch_size": 8, "last_batch": "pad", "block_shards": 2}
LOADING: dict[str, Any] = {"workers": 0, "prefetch_batches": 2, "pin_memory": False}
MB = 1e-3  # in GB
DEADLINE_S = 120


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(cache_dir=str(tmp_path / "cache"), cache_gb=0.1, timeout_s=0.5, retries=3)


@pytest.fixture
def manifest(server: FileServer, options: RemoteOptions) -> Manifest:
    return read_manifest(server.url, options)


def training(manifest: Manifest, **changes: Any) -> Iterator[Batch]:
    fields = {"labels": LABELS, "accumulation": 1, "world": 1, "rank": 0, "start_batch": 0} | ORDER | LOADING
    return train_stream(manifest, **(fields | changes))


def hashes(batches: Iterator[Batch]) -> list[tuple[str, list[int]]]:
    """Pixels and rows of every batch."""
    return [(hashlib.sha256(b.image_B1HW.numpy().tobytes()).hexdigest(), b.sample_B.tolist()) for b in batches]


def objects_bytes(options: RemoteOptions) -> int:
    """What lies in the cache at one moment: nothing is added or evicted while it is counted."""
    sizes: dict[int, int] = {}
    with Cache(options.folder, options.limit_bytes)._ledger():
        for path in options.folder.glob("objects/*/*"):
            with suppress(FileNotFoundError):  # it gets its final name
                sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def needed_bytes(manifest: Manifest) -> int:
    return int(manifest.places(manifest.rows("train")).num_bytes_M.sum())


class TestBatches:
    def test_are_those_of_the_folder(self, folder: Path, manifest: Manifest) -> None:
        assert hashes(training(manifest)) == hashes(training(read_manifest(folder)))

    def test_go_on_anywhere(self, folder: Path, manifest: Manifest) -> None:
        part = {"world": 2, "rank": 1, "node_ranks": (0, 1), "start_batch": 3, "accumulation": 2}
        assert hashes(training(manifest, **part)) == hashes(training(read_manifest(folder), **part))

    def test_of_an_evaluation(self, folder: Path, manifest: Manifest, server: FileServer) -> None:
        row_M = manifest.rows("test")
        both = [
            hashes(evaluation_stream(m, labels=LABELS, rows=row_M, batch_size=5, **LOADING))
            for m in (manifest, read_manifest(folder))
        ]
        assert both[0] == both[1]

    @pytest.mark.parametrize("fault", ["drop", "stall", "flip", "busy", "short"])
    def test_are_the_same_when_the_network_fails(
        self, folder: Path, manifest: Manifest, server: FileServer, fault
    ) -> None:
        server.faults.extend([fault] * 3)
        assert hashes(training(manifest)) == hashes(training(read_manifest(folder)))
        assert not server.faults

    @pytest.mark.parametrize("mode", ["ignores", "refuses"])
    def test_come_from_whole_shards_where_parts_are_refused(
        self, folder: Path, server: FileServer, options: RemoteOptions, mode: str
    ) -> None:
        server.mode = mode
        manifest = read_manifest(server.url, options)
        assert "refuses ranges, so whole shards are downloaded" in str(manifest.remote)
        for _ in range(2):
            assert hashes(training(manifest)) == hashes(training(read_manifest(folder)))
        used = {manifest.shards[i].name for i in manifest.shard_N()[manifest.rows("train")]}
        assert sorted(sent.name for sent in server.gets()) == sorted(used)
        assert objects_bytes(options) == server.num_bytes()


class TestRequests:
    def test_fetch_what_is_used_and_that_once(self, manifest: Manifest, server: FileServer) -> None:
        epochs = [hashes(training(manifest, epoch=epoch)) for epoch in range(3)]
        assert len({tuple(map(str, epoch)) for epoch in epochs}) == 3
        assert times_sent(manifest, server).tolist() == only(manifest, manifest.rows("train"))
        # beside them the headers and the json that lie between neighbours
        assert server.num_bytes() - needed_bytes(manifest) < 4096 * len(manifest.rows("train"))

    def test_neighbours_come_together(self, manifest: Manifest, server: FileServer) -> None:
        rows = manifest.rows("test")
        list(evaluation_stream(manifest, labels=LABELS, rows=rows, batch_size=2, **LOADING))
        assert times_sent(manifest, server).tolist() == only(manifest, rows)
        assert len(server.gets()) <= len(rows) / 2

    def test_are_for_the_ranks_of_this_machine_alone(self, manifest: Manifest, server: FileServer) -> None:
        """Two ranks of four are here; what the others need is not fetched."""
        plan = train_plan(manifest, **ORDER)
        columns = rank_columns(8, 4, [2, 3], 1)
        here = np.unique(plan.rows_GB[:, columns])
        for rank in (2, 3):
            hashes(training(manifest, world=4, rank=rank, node_ranks=(2, 3)))
        assert len(here) < len(manifest.rows("train"))
        assert times_sent(manifest, server).tolist() == only(manifest, here)

    def test_the_manifest_is_copied_once_and_again_when_it_changes(
        self, server: FileServer, options: RemoteOptions, manifest: Manifest
    ) -> None:
        for _ in range(3):
            assert read_manifest(server.url, options).fingerprint == manifest.fingerprint
        # whole, and one byte to see whether parts are served
        assert [sent.num_bytes for sent in server.gets("manifest.json")][1:] == [1]
        assert len(server.gets("samples.arrow")) == 1

    def test_of_a_manifest_that_is_open(self, manifest: Manifest, server: FileServer) -> None:
        before = len(server.sent)
        again = pickle.loads(pickle.dumps(manifest))
        assert len(server.sent) == before
        assert again.place == manifest.place == server.url


class TestAhead:
    def test_a_batch_is_there_before_it_is_read(self, manifest: Manifest) -> None:
        """Where the network keeps up, the loop never waits but for the first batch."""
        rows_GB = train_plan(manifest, **ORDER).rows_GB
        cache = manifest.remote.cache()
        with ShardReader(manifest, Coming(rows_GB.reshape(-1), rows_GB.shape[1])) as reader:
            for g in range(len(rows_GB)):
                reader.reach(g)
                for row in rows_GB[g : g + 2].reshape(-1).tolist():
                    wait_for(partial(cache.has, manifest.location(row)[3]), deadline_s=DEADLINE_S)
                for row in rows_GB[g].tolist():
                    reader.read(row)
            assert reader.waits == 0

    def test_no_further_than_the_cache_has_room(self, server: FileServer, options: RemoteOptions) -> None:
        """The cache is smaller than the folder: it keeps its bound, and evicts nothing before it is used."""
        small = RemoteOptions(**(vars(options) | {"cache_gb": 0.9 * MB}))
        manifest = read_manifest(server.url, small)
        assert needed_bytes(manifest) > 1.2 * small.limit_bytes
        for epoch in range(2):
            for _ in training(manifest, epoch=epoch, batch_size=4):
                assert objects_bytes(small) <= small.limit_bytes
            assert times_sent(manifest, server).max() <= epoch + 1
        assert server.num_bytes() > needed_bytes(manifest)
        assert objects_bytes(small) == manifest.remote.cache().held_bytes() <= small.limit_bytes

    def test_a_cache_that_holds_no_batches_is_refused(self, server: FileServer, options: RemoteOptions) -> None:
        manifest = read_manifest(server.url, RemoteOptions(**(vars(options) | {"cache_gb": 0.5 * MB})))
        with pytest.raises(UserError, match=r"the cache of 500.0 kB does not hold the 8 batches") as caught:
            training(manifest)
        assert "data.cache_gb" in caught.value.fix


class TestFeatures:
    def test_are_those_of_the_folder(self, folder: Path, tmp_path: Path, options: RemoteOptions) -> None:
        manifest = read_manifest(folder)
        here = make_features(manifest, tmp_path / "features")
        with serving(tmp_path / "features") as server:
            server.faults.extend(["drop", "flip"])
            there = read_features(server.url, options)
            assert there.where == server.url
            for both in zip(training(manifest, features=here), training(manifest, features=there), strict=True):
                levels = [batch.levels for batch in both]
                assert all(torch.equal(levels[0][level], levels[1][level]) for level in here.levels)
            report = verify_features(server.url, processes=1, quiet=True)
            assert report.ok, report
            assert report.summary()["directory"] == server.url


class TestBroken:
    def test_a_byte_that_is_wrong_every_time(self, manifest: Manifest, server: FileServer) -> None:
        server.always = "flip"
        row = int(manifest.rows("train")[0])
        with ShardReader(manifest) as reader, pytest.raises(UserError, match="is another, 2 times in a row") as caught:
            reader.read(row)
        assert caught.value.file == f"{server.url}/{manifest.shards[0].name}"
        assert manifest.record(row).image_id in caught.value.thing
        assert f"msmil verify {server.url}" in caught.value.fix
        assert len(server.gets()) == 2

    def test_the_error_stands_in_its_place_in_the_order(self, folder: Path, tmp_path: Path, options) -> None:
        rows_GB = train_plan(read_manifest(folder), **ORDER).rows_GB
        row = int(rows_GB[4][0])
        copy = tmp_path / "broken"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        shard, offset, *_ = read_manifest(folder).location(row)
        tar = copy / f"shard-{shard:06d}.tar"
        data = bytearray(tar.read_bytes())
        data[offset] ^= 1
        tar.write_bytes(data)
        with serving(copy) as server:
            manifest = read_manifest(server.url, options)
            batches = training(manifest)
            assert hashes(next(batches) for _ in range(4)) == hashes(training(read_manifest(folder)))[:4]
            with pytest.raises(UserError, match=f"row {row}") as caught:
                next(batches)
            assert caught.value.file == f"{server.url}/{tar.name}"

    def test_a_byte_that_this_disk_has_changed_is_fetched_again(
        self, folder: Path, manifest: Manifest, server: FileServer
    ) -> None:
        before = hashes(training(manifest))
        requests = len(server.gets())
        for path in sorted(manifest.remote.options.folder.glob("objects/*/*"))[:5]:
            path.write_bytes(b"x" * path.stat().st_size)
        assert hashes(training(manifest)) == before
        assert 0 < len(server.gets()) - requests <= 5

    def test_a_whole_shard_that_is_wrong_every_time(self, server: FileServer, options: RemoteOptions) -> None:
        server.mode, server.always = "refuses", "flip"
        manifest = read_manifest(server.url, options)
        with ShardReader(manifest) as reader, pytest.raises(UserError, match="its checksum is another") as caught:
            reader.read(0)
        assert caught.value.file == f"{server.url}/{manifest.shards[0].name}"
        assert objects_bytes(options) == 0

    def test_a_table_that_is_wrong(self, folder: Path, tmp_path: Path, options: RemoteOptions) -> None:
        copy = tmp_path / "broken"
        copy.mkdir()
        (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
        (copy / "samples.arrow").write_bytes(bytes((folder / "samples.arrow").stat().st_size))
        with serving(copy) as server, pytest.raises(UserError, match="its checksum is another") as caught:
            read_manifest(server.url, options)
        assert caught.value.file == f"{server.url}/samples.arrow"

    def test_no_packed_folder(self, tmp_path: Path, options: RemoteOptions) -> None:
        with serving(tmp_path) as server:
            with pytest.raises(UserError, match=r"there is no manifest\.json") as caught:
                read_manifest(server.url, options)
            assert caught.value.file == server.url
            (tmp_path / "manifest.json").write_text("{}")
            with pytest.raises(UserError, match="is not a manifest") as caught:
                read_manifest(server.url, options)
            assert caught.value.file == f"{server.url}/manifest.json"

    def test_a_tar_that_is_missing_or_cut(self, folder: Path, tmp_path: Path, options: RemoteOptions) -> None:
        copy = tmp_path / "cut"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        with serving(copy) as server:
            manifest = read_manifest(server.url, options)
            check_shards(manifest)
            last = copy / manifest.shards[-1].name
            last.write_bytes(last.read_bytes()[:-512])
            with pytest.raises(UserError, match="truncated"):
                check_shards(manifest)
            last.unlink()
            with pytest.raises(UserError, match="missing"):
                check_shards(manifest)

    def test_a_cache_of_another_user(
        self, server: FileServer, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(UserError, match="belongs to another user"):
            read_manifest(server.url, options)

    def test_a_disk_too_small_for_the_cache(self, server: FileServer, options: RemoteOptions) -> None:
        manifest = read_manifest(server.url, RemoteOptions(**(vars(options) | {"cache_gb": 1e9})))
        with pytest.raises(UserError, match="may grow to") as caught:
            manifest.remote.check_disk()
        assert "data.cache_gb" in caught.value.fix
