"""Tars that break under a run: all ranks stop with one message; or, asked for, samples are skipped on all alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msmil.config_io import load_config
from msmil.engine.checkpoint_state import newest
from msmil.reporting.curves import read_curves
from msmil.reporting.html import Budget
from msmil.reporting.run_files import read_run
from msmil.reporting.sections.training import training_section
from shards.manifest import Manifest, read_manifest
from shards.stream import train_plan
from tests import forked
from tests.distributed.runs import zero
from tests.experiments import write_tiny
from tests.faults.launcher import Launcher, Started, poll
from tests.faults.places import step_of
from tests.worlds import environment

pytestmark = pytest.mark.slow

LONG = {"train": {"epochs": 5000}, "evaluate": {"every_epochs": 5000}, "checkpoint": {"keep_last": 1}}


def flip(manifest: Manifest, row: int) -> None:
    """Change a byte in the middle of a sample."""
    shard, offset, size, *_ = manifest.location(row)
    with (manifest.directory / manifest.shards[shard].name).open("r+b") as tar:
        tar.seek(offset + size // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 0xFF]))


def truncate(manifest: Manifest, row: int) -> None:
    """Cut a tar off in front of a sample."""
    shard, offset, *_ = manifest.location(row)
    with (manifest.directory / manifest.shards[shard].name).open("r+b") as tar:
        tar.truncate(offset)


def remove(manifest: Manifest, row: int) -> None:
    """Remove the tar of a sample."""
    (manifest.directory / manifest.shards[manifest.location(row)[0]].name).unlink()


@pytest.fixture
def manifest(tmp_path: Path, packed: Path) -> Manifest:
    """A packed folder to break."""
    shutil.copytree(packed, tmp_path / "shards")
    return read_manifest(tmp_path / "shards")


def tar_of(manifest: Manifest, row: int) -> str:
    return manifest.shards[manifest.location(row)[0]].name


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "truncated"), (flip, "changed since it was packed"), (remove, "missing")],
    ids=["truncated", "flipped", "removed"],
)
def test_a_tar_that_breaks_between_epochs_stops_all_ranks_with_one_message(
    launcher: Launcher, tmp_path: Path, manifest: Manifest, damage: Callable[[Manifest, int], None], said: str
) -> None:
    started = launcher.start(write_tiny(tmp_path, manifest.directory, **LONG))
    poll(lambda: step_of(started.place(0)) > 15, deadline_s=60)
    row = int(manifest.rows("train")[-1])
    damage(manifest, row)
    assert_stopped(started, launcher.wait(started, end_others=False), tar_of(manifest, row), said, "sample", "Fix:")


def test_under_another_launcher_the_cause_is_the_last_line_of_the_log_once(tmp_path: Path, manifest: Manifest) -> None:
    """The launcher prints what each rank says, and its own traceback."""
    flip(manifest, row := int(manifest.rows("train")[-1]))
    ranks = forked.rank_environments(environment(), 2)
    ended = forked.run_ranks("launch.train", [str(write_tiny(tmp_path, manifest.directory))], ranks, deadline_s=120)
    assert ended.code == 2
    log = (tmp_path / "runs" / "tiny" / "log.txt").read_text().splitlines()
    assert log[-1].startswith("msmil: error:")
    assert tar_of(manifest, row) in log[-1]
    assert sum("changed since it was packed" in line for line in log) == 1


def assert_stopped(started: Started, codes: list[int], *named: str) -> None:
    """A rank says why and ends with 2; another that met the same says the same, or has lost its peer."""
    assert 2 in codes
    assert set(codes) <= {2, 1}, codes
    assert len(started.failures) == codes.count(2)
    for line in started.failures:
        assert all(text in line for text in named), line
    assert not any("Traceback" in started.said(rank) for rank in range(len(codes)))


def skipping(folder: Path, manifest: Manifest, name: str, *, largest: float = 0.1, **sections: Any) -> Path:
    data = {"on_error": "skip", "max_skipped_fraction": largest}
    return write_tiny(folder, manifest.directory, name=name, data=data, checkpoint={"every_steps": 1}, **sections)


def test_a_sample_is_skipped_on_all_ranks_alike_counted_named_and_shown(
    launcher: Launcher, tmp_path: Path, manifest: Manifest, blank_figures: None
) -> None:
    """The sample is in the first step; the run is stopped in its second and goes on."""
    config = skipping(tmp_path, manifest, "two")
    read = load_config(config)
    plan = train_plan(manifest, seed=read.seed, epoch=0, batch_size=6, last_batch="pad", block_shards=16)
    row = int(plan.batch(0)[0][-1])
    flip(manifest, row)
    started = launcher.start(config, fault="tests.faults.hooks:stop_request_in_step_2")
    assert launcher.wait(started, end_others=False) == [143, 143]
    run = tmp_path / "runs" / "two"
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())["train_state"]
    assert (state["step"], state["samples_seen"], state["skipped"]) == (2, 11, 1)
    started = launcher.start(config)
    assert launcher.wait(started) == [0, 0]

    samples = len(manifest.rows("train"))
    log = (run / "log.txt").read_text()
    assert log.count("skipped (1 in this epoch)") == 2
    assert f"(row {row})" in log
    assert tar_of(manifest, row) in log
    assert [f"epoch {e}: 1 of {samples} samples were skipped" in log for e in (1, 2)] == [True, True]
    curves = read_curves(run / "tensorboard")
    steps, counts = curves.scalars["train/skipped_samples"]
    assert steps.tolist() == [plan.num_batches, 2 * plan.num_batches]
    assert counts.tolist() == [1, 1]
    section = training_section(read_run(run, name="two", split="test"), "", Budget(10**6))
    assert "skipped (data.on_error: skip): 1 in the last epoch" in str(section.body)

    assert launcher.wait(launcher.start(skipping(tmp_path, manifest, "one"), ranks=1)) == [0]
    alone = read_curves(tmp_path / "runs" / "one" / "tensorboard").scalars["train/loss/total"]
    together = curves.scalars["train/loss/total"]
    assert alone[0].tolist() == together[0].tolist()
    np.testing.assert_allclose(together[1], alone[1], rtol=1e-5)


def test_too_many_skipped_samples_stop_all_ranks_with_the_same_message(
    launcher: Launcher, tmp_path: Path, manifest: Manifest
) -> None:
    row = int(manifest.rows("train")[0])
    remove(manifest, row)
    started = launcher.start(skipping(tmp_path, manifest, "gone", largest=0.05))
    assert launcher.wait(started, end_others=False) == [2, 2]
    assert len(set(started.failures)) == 1
    assert "data.max_skipped_fraction" in started.failures[0]
    assert tar_of(manifest, row) in started.failures[0]


@pytest.mark.parametrize("train", [{}, zero(3)], ids=["ddp", "zero3"])
def test_a_validation_image_is_never_skipped(
    launcher: Launcher, tmp_path: Path, manifest: Manifest, train: dict[str, Any]
) -> None:
    """Under ZeRO-3 the other rank waits for the one that ends in the middle of its forward."""
    row = int(manifest.rows("val")[0])
    flip(manifest, row)
    started = launcher.start(skipping(tmp_path, manifest, "val", train=train))
    assert_stopped(started, launcher.wait(started, end_others=False), tar_of(manifest, row), f"(row {row})")
