"""A loss that is NaN on one rank stops all of them before the update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msmil.config_io import load_config
from shards.manifest import read_manifest
from shards.plan import rank_slice
from shards.stream import train_plan
from tests.faults.experiments import write_full
from tests.faults.hooks import NAN_MICRO, NAN_STEP
from tests.faults.launcher import Launcher

pytestmark = pytest.mark.long


def test_no_parameter_changes_and_the_samples_of_that_rank_are_named(
    launcher: Launcher, tmp_path: Path, packed: Path
) -> None:
    config = write_full(tmp_path, packed, "nan")
    started = launcher.start(config, fault="tests.faults.hooks:nan_loss_of_rank_1")
    assert launcher.wait(started) == [2, 2]
    assert len(started.failures) == 2
    assert len(set(started.failures)) == 1, "both ranks give the same reason"
    for rank in range(2):
        told = json.loads((started.folder / f"parameters_{rank}.json").read_text())
        assert told["step"] == NAN_STEP
        assert told["before"] == told["after"]
    manifest, read = read_manifest(packed), load_config(config)
    size = read.train.batch_size
    data = {"last_batch": read.data.last_batch, "block_shards": read.data.shuffle_block_shards}
    rows_B, _ = train_plan(manifest, seed=read.seed, epoch=0, batch_size=size, **data).batch(NAN_STEP)
    guilty = rows_B[rank_slice(size, 2, 1, read.train.accumulation)[NAN_MICRO]].tolist()
    named = started.failures[0]
    assert [row for row in manifest.rows("train").tolist() if manifest.record(row).key in named] == sorted(guilty)
    assert "Fix:" in named
