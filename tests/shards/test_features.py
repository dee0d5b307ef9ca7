"""Feature shards: what goes in comes out, the same bytes each time, and what is broken is named."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import zstandard
from safetensors.torch import load

from launch.cli import main
from shards.errors import UserError
from shards.feature_codec import TYPES, decode, encode
from shards.feature_pack import write_shard
from shards.feature_reader import FeatureReader
from shards.features import Features, read_features
from shards.manifest import Manifest, read_manifest
from tests.archives import contents
from tests.features import BATCH, SHAPES, batches, make_features, make_job, random_levels, write_left

pytestmark = pytest.mark.slow

# of a number x that is stored: |error| <= relative * |x| + absolute (half a unit in the last place; subnormals of fp16)
ERROR = {"fp32": (0.0, 0.0), "bf16": (2**-8, 0.0), "fp16": (2**-11, 2**-25)}


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


@pytest.fixture(scope="module")
def features(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return make_features(manifest, tmp_path_factory.mktemp("features") / "out")


@pytest.fixture
def own(manifest: Manifest, tmp_path: Path) -> Path:
    """A folder for a test to break."""
    return make_features(manifest, tmp_path / "own").directory


class TestStorage:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("zstd", [False, True])
    def test_numbers_come_back_to_the_precision_of_their_type(self, dtype: Any, zstd: bool) -> None:
        relative, absolute = ERROR[dtype]
        levels = random_levels(3) | {16: random_levels(3)[16] * 1e-6}
        data = encode(levels, dtype, zstd=zstd)
        back = decode(data, SHAPES, dtype, zstd=zstd, name="x")
        for level, x in levels.items():
            assert back[level].dtype == TYPES[dtype]
            error = (back[level].double() - x.double()).abs()
            assert bool((error <= relative * x.double().abs() + absolute).all())
        assert data == encode(levels, dtype, zstd=zstd)

    def test_the_bounds_are_tight(self) -> None:
        x = random_levels(0)
        for dtype in ("bf16", "fp16"):
            back = decode(encode(x, dtype, zstd=False), SHAPES, dtype, zstd=False, name="x")
            error = ((back[16].double() - x[16]).abs() / x[16].abs()).max()
            assert error > ERROR[dtype][0] / 2

    def test_zstd_stores_less_and_decompresses_to_the_plain_file(self) -> None:
        levels = {16: torch.zeros(1, 64, 8, 8)}
        plain, packed = (encode(levels, "fp32", zstd=zstd) for zstd in (False, True))
        assert len(packed) < len(plain) / 10
        assert zstandard.ZstdDecompressor().decompress(packed) == plain

    def test_a_number_too_large_for_fp16_is_refused_and_bf16_holds_it(self) -> None:
        levels = {16: torch.full(SHAPES[16], 1e5)}
        with pytest.raises(UserError, match=r"level 16 reaches 1e\+05, which fp16 cannot hold.*bf16"):
            encode(levels, "fp16", zstd=False)
        encode(levels, "bf16", zstd=False)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_is_refused_with_the_sample(
        self, manifest: Manifest, tmp_path: Path, value: float
    ) -> None:
        job = make_job(manifest, tmp_path / "out")
        made = list(batches(job.rows(1)))
        made[1][32][2, 0, 0, 0, 0] = value
        row = job.rows(1).start + BATCH + 2
        with pytest.raises(UserError, match=f"sample {manifest.record(row).key}: level 32 .*not finite"):
            write_shard(job, 1, made, 0)
        assert not list(job.out.glob("*.tar"))
        assert job.left() == list(range(job.num_shards))


class TestFolder:
    def test_every_row_of_the_packed_folder_has_its_features(self, features: Features, manifest: Manifest) -> None:
        assert len(features) == len(manifest) == 96
        with FeatureReader(read_features(features.directory)) as reader:
            for row in range(len(manifest)):
                assert features.key(row) == manifest.record(row).key
                for level, x in reader.read(row).items():
                    assert torch.equal(x, random_levels(row)[level])

    @pytest.mark.parametrize(("dtype", "zstd"), [("fp32", False), ("bf16", True)])
    def test_webdataset_reads_it_unaided(self, manifest: Manifest, tmp_path: Path, dtype: Any, zstd: bool) -> None:
        made = make_features(manifest, tmp_path / "out", dtype=dtype, zstd=zstd)
        tars = [str(made.directory / shard.name) for shard in made.shards]
        seen = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert [sample["__key__"] for sample in seen] == [manifest.record(row).key for row in range(len(manifest))]
        data = seen[9]["safetensors.zst" if zstd else "safetensors"]
        levels = load(zstandard.ZstdDecompressor().decompress(data) if zstd else data)
        assert torch.equal(levels["16"], random_levels(9)[16].to(TYPES[dtype]))
        assert json.loads(seen[9]["json"])["labels"] == manifest.record(9).labels

    def test_its_size_is_that_of_the_numbers(self, features: Features) -> None:
        numbers = sum(math.prod(shape) for shape in SHAPES.values())
        assert features.num_bytes == 4 * numbers
        assert features.only([32]).num_bytes == 4 * math.prod(SHAPES[32])

    def test_only_the_asked_levels_are_read(self, features: Features) -> None:
        with FeatureReader(features.only([32])) as reader:
            assert list(reader.read(0)) == [32]

    def test_it_travels_to_another_process_by_name(self, features: Features) -> None:
        sent = pickle.dumps(features.only([16]))
        assert len(sent) < 1000
        back = pickle.loads(sent)
        assert list(back.levels) == [16]
        assert back.place(7) == features.place(7)

    def test_an_interrupted_extraction_goes_on_and_gives_the_same_bytes(
        self, features: Features, manifest: Manifest, tmp_path: Path
    ) -> None:
        job = make_job(manifest, tmp_path / "out")

        def dies() -> Any:
            yield from list(batches(job.rows(2)))[:1]
            raise KeyboardInterrupt

        for shard in (0, 5):
            write_shard(job, shard, batches(job.rows(shard)), 0)
        with pytest.raises(KeyboardInterrupt):
            write_shard(job, 2, dies(), 0)
        whole = {name: stat for name, stat in contents(job.out).items() if name.endswith(".tar")}
        assert len(whole) == 2
        os.truncate(job.out / "shard-000005.tar", 100)  # as after a power cut
        assert job.left() == [shard for shard in range(job.num_shards) if shard != 0]
        before = (job.out / "shard-000000.tar").stat().st_mtime_ns
        write_left(job)
        assert (job.out / "shard-000000.tar").stat().st_mtime_ns == before
        for shard in features.shards:
            assert (job.out / shard.name).read_bytes() == (features.directory / shard.name).read_bytes()

    def test_shards_of_other_settings_are_not_taken_for_ours(self, manifest: Manifest, tmp_path: Path) -> None:
        write_left(make_job(manifest, tmp_path / "out", dtype="fp16"))
        job = make_job(manifest, tmp_path / "out", dtype="bf16")
        assert job.left() == list(range(job.num_shards))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "manifest.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".extracting").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("break_it", "file", "said"),
    [
        (remove("shard-000001.tar"), "shard-000001.tar", "missing"),
        (lambda folder: os.truncate(folder / "shard-000001.tar", 512), "shard-000001.tar", "truncated: 512 bytes"),
        (lambda f: (f / "shard-000001.tar").open("ab").write(b"x"), "shard-000001.tar", "longer than extracted"),
        (remove("features.arrow"), "features.arrow", "missing"),
        (lambda folder: (folder / "features.arrow").open("r+b").write(b"x"), "features.arrow", "changed since"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json", "not JSON"),
        (unfinished, "", "the extraction was not finished"),
        (edit(lambda c: c.update(format="msmil-shards")), "manifest.json", "not a manifest of features"),
        (edit(lambda c: c.update(schema_version=9)), "manifest.json", "schema version 9"),
        (edit(lambda c: c.update(dtype="int8")), "manifest.json", "dtype is 'int8'"),
        (edit(lambda c: c.pop("levels")), "manifest.json", "levels"),
        (edit(lambda c: c.update(levels={"16": [1, 0]})), "manifest.json", "level 16"),
        (edit(lambda c: c["encoder"].pop("sha256")), "manifest.json", "encoder lacks sha256"),
        (edit(lambda c: c["shards"][0].pop("name")), "manifest.json", "name"),
    ],
)
def test_a_broken_folder_is_refused_when_it_is_opened(
    own: Path, break_it: Callable[[Path], object], file: str, said: str
) -> None:
    break_it(own)
    with pytest.raises(UserError) as caught:
        read_features(own)
    assert said in caught.value.thing
    assert caught.value.file == str(own / file)
    assert "extract" in caught.value.fix


def test_a_packed_folder_is_no_folder_of_features(packed: Path, own: Path) -> None:
    with pytest.raises(UserError, match="not a manifest of features"):
        read_features(packed)
    with pytest.raises(UserError, match="not a manifest of packed mammograms"):
        read_manifest(own)


class TestReading:
    def test_a_changed_byte_is_named_with_its_sample(self, own: Path, manifest: Manifest) -> None:
        made = read_features(own)
        place = made.place(20)
        with (own / made.shards[place.shard].name).open("r+b") as tar:
            tar.seek(place.offset_bytes + place.num_bytes - 1)
            last = tar.read(1)
            tar.seek(-1, io.SEEK_CUR)
            tar.write(bytes([last[0] ^ 1]))
        with FeatureReader(read_features(own)) as reader:
            reader.read(19)
            with pytest.raises(UserError, match=rf"changed since it was extracted: .*{manifest.record(20).key}"):
                reader.read(20)

    def test_a_tar_truncated_while_it_is_in_use(self, own: Path) -> None:
        made = read_features(own)
        os.truncate(own / made.shards[2].name, made.place(17).offset_bytes + 10)
        with FeatureReader(made) as reader, pytest.raises(UserError, match=r"truncated: sample .* \(row 17\)"):
            reader.read(17)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda c: c.update(dtype="fp16"), r"level 16 of .* is \[2, 5, 4, 3\] float32 where .* float16"),
            (lambda c: c["levels"].update({"32": [2, 7, 2, 3]}), r"level 32 of .* is \[2, 7, 2, 2\] .* \[2, 7, 2, 3\]"),
            (lambda c: c["levels"].update({"64": [2, 7, 1, 1]}), "lack level 64"),
            (lambda c: c.update(zstd=True), "cannot be decoded"),
        ],
    )
    def test_features_of_another_form_than_promised(self, own: Path, change: Any, said: str) -> None:
        edit(change)(own)
        with FeatureReader(read_features(own)) as reader, pytest.raises(UserError, match=said) as caught:
            reader.read(0)
        assert caught.value.file == str(own / "shard-000000.tar")

    def test_nothing_is_unpickled(self, own: Path) -> None:
        with tarfile.open(own / "shard-000000.tar") as tar:
            names = tar.getnames()
        assert {name.partition(".")[2] for name in names} == {"json", "safetensors"}


class TestVerify:
    def test_a_whole_folder_is_told_to_be_whole(self, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(own), "--processes", "1"]) == 0
        assert "96 images in 12 shards, all as extracted" in capsys.readouterr().out

    def test_every_broken_shard_is_named(self, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
        features = read_features(own)
        for row in (3, 4, 50):
            place = features.place(row)
            with (own / features.shards[place.shard].name).open("r+b") as tar:
                tar.seek(place.offset_bytes + 20)
                tar.write(b"??")
        (own / "foreign.tar").touch()
        assert main(["verify", str(own), "--processes", "1", "--quiet"]) == 2
        said = capsys.readouterr().out
        assert "6 problems in 3 files" in said
        assert all(f"(row {row})" in said for row in (3, 4, 50))
        assert "foreign.tar" in said
