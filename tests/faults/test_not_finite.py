"""A loss or a gradient that is not finite on one rank stops all of them before the update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msmil.config_io import load_config
from shards.manifest import read_manifest
from shards.plan import rank_slice
from shards.stream import train_plan
from tests.faults.experiments import ON, write_full
from tests.faults.hooks import ACCUMULATION, NAN_MICRO, NAN_STEP
from tests.faults.launcher import Launcher, Started

pytestmark = pytest.mark.slow


BATCH: int = ON["train"]["batch_size"]
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"engine": "deepspeed", "zero_stage": 2}}


def stopped_as_one(launcher: Launcher, started: Started) -> str:
    """The one reason that both ranks give, once it is seen that they stopped before any parameter changed."""
    assert launcher.wait(started, end_others=False) == [2, 2]
    assert len(started.failures) == 2
    assert len(set(started.failures)) == 1, "both ranks give the same reason"
    for rank in range(2):
        told = json.loads((started.folder / f"parameters_{rank}.json").read_text())
        assert told["step"] == NAN_STEP
        assert told["before"] == told["after"]
    assert "Fix:" in started.failures[0]
    return started.failures[0]


def test_at_a_nan_loss_no_parameter_changes_and_the_samples_of_that_rank_are_named(
    launcher: Launcher, tmp_path: Path, packed: Path
) -> None:
    config = write_full(tmp_path, packed, "nan")
    named = stopped_as_one(launcher, launcher.start(config, fault="tests.faults.hooks:nan_loss_of_rank_1"))
    guilty = images(config, packed, rank_slice(BATCH, 2, 1, ACCUMULATION)[NAN_MICRO])
    assert [key for key in all_images(packed) if key in named] == guilty


@pytest.mark.parametrize("engine", ENGINES)
def test_at_an_infinite_gradient_no_parameter_changes_and_the_samples_of_the_batch_are_named(
    launcher: Launcher, tmp_path: Path, packed: Path, engine: str
) -> None:
    """Where the loss is finite, no rank knows whose gradient it is: their sum is all that is looked at."""
    config = write_full(tmp_path, packed, "infinite", train=ENGINES[engine])
    named = stopped_as_one(launcher, launcher.start(config, fault="tests.faults.hooks:infinite_gradient_of_rank_1"))
    assert "the gradient is not finite" in named
    assert [key for key in all_images(packed) if key in named] == images(config, packed, slice(None))


def all_images(packed: Path) -> list[str]:
    manifest = read_manifest(packed)
    return [manifest.record(row).key for row in manifest.rows("train").tolist()]


def images(config: Path, packed: Path, columns: slice) -> list[str]:
    """What the step that fails holds in these columns of its batch."""
    manifest, read = read_manifest(packed), load_config(config)
    assert (read.train.batch_size, read.train.accumulation) == (BATCH, ACCUMULATION)
    data = {"last_batch": read.data.last_batch, "block_shards": read.data.shuffle_block_shards}
    rows_B, _ = train_plan(manifest, seed=read.seed, epoch=0, batch_size=BATCH, **data).batch(NAN_STEP)
    return [manifest.record(row).key for row in sorted(rows_B[columns].tolist())]
