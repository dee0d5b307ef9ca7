"""`msmil extract` as a user runs it: killed, resumed on another number of ranks, on a disk that fills up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import parse
from launch.evaluate import _config as evaluated_config
from launch.extract import rank_main
from launch.train import rank_main as train_rank
from shards.features import read_features
from tests.archives import contents
from tests.experiments import write_tiny
from tests.faults.test_full_disk import fill
from tests.msmil.engine.test_train import reset
from tests.worlds import ROOT, children_running, environment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu")]

# two images to a shard: enough shards to be killed between two of them
MANY = ["--images-per-shard", "2"]


def tiny(folder: Path, packed: Path, **sections: Any) -> str:
    return str(write_tiny(folder, packed, **{"evaluate": {"batch_size": 2}, **sections}))


def alone(*arguments: str) -> int:
    """One rank in this process."""
    reset()
    return rank_main(arguments)


def one_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("msmil: error:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.fixture
def killed(tmp_path: Path, packed: Path) -> Path:
    """What two ranks had written when all processes were killed without warning."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "launch.cli", "extract", tiny(tmp_path, packed), str(out), *MANY, "--ranks", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    work = out / ".extracting"
    wait_for(lambda: len(list(work.glob("shard-*.json"))) >= 4, deadline_s=100)
    for pid in [process.pid, *children_running("launch.extract", process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return out


def test_killed_on_two_ranks_it_goes_on_on_one_to_the_bytes_of_an_unbroken_one(
    tmp_path: Path, packed: Path, killed: Path
) -> None:
    whole = {int(path.stem[-6:]) for path in (killed / ".extracting").glob("shard-*.json")}
    assert 4 <= len(whole) < 48
    assert {shard % 2 for shard in whole} == {0, 1}, "both ranks wrote"
    times = {shard: (killed / f"shard-{shard:06d}.tar").stat().st_mtime_ns for shard in whole}
    config = tiny(tmp_path, packed)
    assert alone(config, str(killed), *MANY) == 0
    for shard, time in times.items():
        assert (killed / f"shard-{shard:06d}.tar").stat().st_mtime_ns == time, "what was whole is kept"
    assert alone(config, str(tmp_path / "unbroken"), *MANY) == 0
    assert contents(killed) == contents(tmp_path / "unbroken")
    assert len(read_features(killed)) == 96


def test_a_disk_that_fills_up_is_one_error_and_the_same_command_goes_on(
    tmp_path: Path, packed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        config, out = tiny(tmp_path, packed), disk / "out"
        # somebody else writes while the extraction runs: what was free when it began is not
        from shards import feature_pack

        write, written = feature_pack.atomic_file, []

        def crowded(path: Path, **options: Any) -> Any:
            written.append(path)
            if len(written) == 9:
                fill(disk / "ballast")
            return write(path, **options)

        monkeypatch.setattr(feature_pack, "atomic_file", crowded)
        assert alone(config, str(out), *MANY) == 2
        assert "the disk is full" in one_error(capfd.readouterr().err)
        assert not list(out.glob(".*.tmp"))
        (disk / "ballast").unlink()
        assert alone(config, str(out), *MANY) == 0
        shutil.copytree(out, tmp_path / "from_disk")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert len(read_features(tmp_path / "from_disk")) == 96


def test_a_feature_shard_changed_after_the_extraction_stops_training_with_its_name(
    tmp_path: Path, packed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = tiny(tmp_path, packed), tmp_path / "out"
    assert alone(config, str(out)) == 0
    tar = sorted(out.glob("*.tar"))[0]
    data, features = bytearray(tar.read_bytes()), read_features(out)
    for place in map(features.place, range(features.shards[0].num_samples)):  # an epoch reads one of them for sure
        data[place.offset_bytes + place.num_bytes - 1] ^= 0xFF
    tar.write_bytes(data)
    capfd.readouterr()
    reset()
    flips = ["bags.augment.horizontal_flip=0", "bags.augment.vertical_flip=0"]
    assert train_rank([config, f"data.features={out}", "train.encoder=frozen", *flips]) == 2
    error = one_error(capfd.readouterr().err)
    assert tar.name in error
    assert "changed since it was extracted" in error
    os.truncate(tar, 1000)
    reset()
    assert train_rank([config, f"data.features={out}", "train.encoder=frozen", *flips]) == 2
    assert "truncated: 1000 bytes" in one_error(capfd.readouterr().err)


@pytest.mark.parametrize(("given", "used"), [([], "stored"), (["--features", "none"], ""), (["--features", "x"], "x")])
def test_an_evaluation_takes_other_features_or_the_images(tmp_path: Path, given: list[str], used: str) -> None:
    flips = {"horizontal_flip": 0, "vertical_flip": 0}
    sections = {"data": {"features": "stored"}, "train": {"encoder": "frozen"}, "bags": {"augment": flips}}
    write_tiny(tmp_path, tmp_path, **sections).rename(tmp_path / "config.yaml")
    args = parse(["evaluate", str(tmp_path), *given])
    assert evaluated_config(args.folder, args.shards, args.features).data.features == used
