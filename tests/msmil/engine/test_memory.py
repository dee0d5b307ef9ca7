"""Out of memory is told in words: the batch, the memory, the settings that would fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msmil.config import Config
from msmil.config_io import config_from_dict, load_config
from msmil.engine import memory
from msmil.engine.ddp import DdpEngine
from msmil.engine.memory import OutOfMemory, explained, fixed_bytes, requested_bytes, training_out_of_memory
from msmil.engine.run import Run, open_run
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import open_stream, stepper_of_epoch
from tests.experiments import TINY, write_tiny
from tests.runs import reset

CPU = torch.device("cpu")
GB = 10**9
ON_A_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ON_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes"
)


@pytest.mark.parametrize(("text", "expected"), [(ON_A_GPU, 2 * 2**30), (ON_A_CPU, 512), ("no memory", 0)])
def test_what_was_asked_for_is_read_from_the_error(text: str, expected: int) -> None:
    assert requested_bytes(RuntimeError(text)) == expected


def test_what_does_not_depend_on_the_batch() -> None:
    module = nn.Linear(10, 10, bias=False)
    assert fixed_bytes(module) == 4 * 100 * 4, "a weight, its gradient and two moments"
    assert fixed_bytes(module.requires_grad_(False)) == 4 * 100


def word(monkeypatch: pytest.MonkeyPatch, peak: float, total: float, images: int, **train: Any) -> OutOfMemory:
    monkeypatch.setattr(memory, "peak_bytes", lambda _: int(peak * GB))
    monkeypatch.setattr(memory, "total_bytes", lambda _: int(total * GB))
    monkeypatch.setattr(memory, "fixed_bytes", lambda _: 0)
    config: Config = config_from_dict(TINY | {"train": TINY["train"] | {"batch_size": 2 * images} | train})
    error = torch.OutOfMemoryError("no memory")
    return training_out_of_memory(error, config, nn.Linear(1, 1), images=images, world=2, device=CPU)


def test_the_batch_is_cut_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 images took 64 GB and wanted more, 40 GB are there: 9 fit at most, so 8 at a time."""
    error = word(monkeypatch, 64, 40, 16)
    assert (
        "out of memory with 16 images at a time (train.batch_size 32 / 2 ranks / train.accumulation 1)" in error.thing
    )
    assert "an image at least 4.0 GB" in error.thing
    assert "a CPU with 40.0 GB of memory" in error.thing
    assert error.fix.startswith("set train.accumulation: 2 (8 images at a time, of which at most 9 fit)")
    assert "train.gradient_checkpointing: true" in error.fix
    assert "train.precision: bf16" in error.fix
    assert "fewer train.trainable_blocks" in error.fix


def test_what_is_done_already_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"precision": "bf16", "gradient_checkpointing": True, "encoder": "frozen"}
    assert word(monkeypatch, 64, 40, 1, **done).fix == "use a GPU with more memory, or pack smaller images"


@pytest.fixture
def run(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run of one rank, whose network finds no memory."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    config = load_config(write_tiny(tmp_path, packed, tracking={"images": 0}))
    run = open_run(config, Runtime(config.train, quiet=True))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(ON_A_GPU)

    monkeypatch.setattr(DdpEngine, "__call__", full)
    yield run
    assert run.tracker is not None
    run.tracker.close()
    run.folder.close()
    reset()


def test_a_step_says_it(run: Run) -> None:
    stepper = stepper_of_epoch(run, 0)
    with pytest.raises(OutOfMemory, match=r"6 images at a time \(train.batch_size 6 / 1 ranks") as raised:
        stepper(open_stream(run, 0), epoch=0, step=0, timer=PhaseTimer(run.pipeline.runtime.synchronize))
    assert "train.accumulation" in raised.value.fix


def test_so_does_what_several_ranks_compute_before_the_first_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DdpEngine, "settle", lambda _, forward: forward())
    with pytest.raises(OutOfMemory, match="6 images at a time"):
        stepper_of_epoch(run, 0)


def test_a_cpu_says_it_too_and_other_errors_stay() -> None:
    def explain(_: Exception) -> OutOfMemory:
        return OutOfMemory("full", fix="less")

    with pytest.raises(OutOfMemory), explained(explain):
        raise RuntimeError(ON_A_CPU)
    with pytest.raises(RuntimeError, match="shapes"), explained(explain):
        raise RuntimeError("shapes do not match")
