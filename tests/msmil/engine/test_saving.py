"""Saving beside the training: what was begun is waited for, a failure is not lost, the clock says when it is due."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import msmil.engine.run as run_module
import msmil.engine.train as engine
from msmil.config_io import load_config
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import checkpoints, newest, pointed
from msmil.engine.preflight import check_experiment
from msmil.engine.runtime import Runtime
from msmil.engine.saving import Saver
from shards.errors import UserError
from tests.experiments import write_tiny
from tests.runs import Killed, reset

pytestmark = pytest.mark.slow


def saver(**more: Any) -> Saver:
    return Saver(**({"every_minutes": 0.0} | more))


def test_it_writes_beside_and_waits() -> None:
    one, go, done = saver(), threading.Event(), []
    one.begin(lambda: (go.wait(10), done.append(1)))
    assert not done
    go.set()
    one.wait()
    assert done == [1]
    assert one.written_s is not None
    one.wait()


def test_a_failure_shows_and_is_raised_once() -> None:
    def fail() -> None:
        raise UserError("the disk is full", fix="make room")

    one = saver()
    one.begin(fail)
    one._thread.join()
    assert one.failed
    with pytest.raises(UserError, match="the disk is full"):
        one.wait()
    assert not one.failed
    one.wait()


def test_as_a_context_it_waits_but_not_where_a_person_interrupts() -> None:
    go, done = threading.Event(), []

    def write() -> None:
        go.wait(10)
        done.append(1)

    def interrupted(kind: type[BaseException]) -> None:
        with saver() as one:
            one.begin(write)
            raise kind

    with pytest.raises(KeyboardInterrupt):
        interrupted(KeyboardInterrupt)
    assert not done
    go.set()
    with pytest.raises(Killed):
        interrupted(Killed)
    assert done


def test_it_is_due_when_the_minutes_are_over_since_the_last_save() -> None:
    now = [100.0]
    one = saver(every_minutes=2, clock=lambda: now[0])
    for seconds, due in ((119, False), (1, True), (30, True)):
        now[0] += seconds
        assert one.due is due
    one.begin(lambda: None)
    assert not one.due
    now[0] += 120
    assert one.due
    assert not saver(clock=lambda: 1e9).due, "0 minutes: never"


# runs in this process


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    yield
    reset()


def steps(folder: Path) -> list[int]:
    return [load_checkpoint(one).state.step for one in checkpoints(folder)]


def test_a_run_saves_by_the_clock(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is asked once per step, and moves on by a minute each time."""
    minutes = iter(range(1000))
    monkeypatch.setattr(run_module, "Saver", lambda **more: Saver(**more, clock=lambda: 60.0 * next(minutes)))
    settings = {"every_minutes": 3, "keep_last": 100}
    config = load_config(write_tiny(tmp_path, packed, train={"epochs": 1, "batch_size": 4}, checkpoint=settings))
    state = engine.train(config, Runtime(config.train))
    # opened at 0, asked at 1, 2, 3: due; saved at 4, asked at 5, 6, 7: due ..
    expected = {*range(3, state.step, 3), state.step}
    assert set(steps(tmp_path / "runs" / "tiny" / "checkpoints")) == expected
    assert len(expected) > 3


def test_a_save_that_fails_stops_the_run_at_the_next_step(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"every_steps": 2, "keep_last": 100}
    config = load_config(write_tiny(tmp_path, packed, train={"epochs": 1, "batch_size": 4}, checkpoint=settings))
    save_checkpoint = engine.save_checkpoint

    def full(root: Path, snapshot: Any) -> Path:
        if snapshot.state.step == 4:
            raise UserError("the disk is full", fix="make room")
        return save_checkpoint(root, snapshot)

    monkeypatch.setattr(engine, "save_checkpoint", full)
    after_step, done = engine.after_step, []

    def counted(run: Any, *where: Any, **more: Any) -> Any:
        done.append(run.state.step + 1)
        return after_step(run, *where, **more)

    monkeypatch.setattr(engine, "after_step", counted)
    with pytest.raises(UserError, match="the disk is full"):
        engine.train(config, Runtime(config.train))
    assert done[-1] in (5, 6)
    assert steps(tmp_path / "runs" / "tiny" / "checkpoints") == [2]
    monkeypatch.setattr(engine, "save_checkpoint", save_checkpoint)
    reset()
    state = engine.train(config, Runtime(config.train))
    assert state.epoch == 1
    assert steps(tmp_path / "runs" / "tiny" / "checkpoints")[:3] == [2, 4, 6]


def test_the_best_are_kept_over_a_resume(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.6}
    settings = {"keep_last": 1, "keep_best": 2}
    train = {"epochs": 5, "batch_size": 48, "head_warmup_epochs": 0}
    config = load_config(write_tiny(tmp_path, packed, train=train, checkpoint=settings))

    def judged(run: Any) -> None:
        state, metric = run.state, metrics[run.state.epoch]
        better = state.best_metric is None or metric > state.best_metric
        best = {"best_metric": metric, "best_step": state.step} if better else {}
        run.state = replace(state, metric=metric, **best)

    save = engine.save

    def killed(run: Any) -> None:
        if run.state.epoch == 4:
            raise Killed
        save(run)

    monkeypatch.setattr(engine, "validate", judged)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", killed)
        with pytest.raises(Killed):
            engine.train(config, Runtime(config.train))
    reset()
    engine.train(config, Runtime(config.train))
    root = tmp_path / "runs" / "tiny" / "checkpoints"
    kept = {load_checkpoint(one).state.epoch: load_checkpoint(one).state.metric for one in checkpoints(root)}
    assert kept == {2: 0.9, 4: 0.8, 5: 0.6}
    best, last = pointed(root, "best"), newest(root)
    assert best is not None
    assert last is not None
    assert (load_checkpoint(best).state.epoch, load_checkpoint(last).state.epoch) == (2, 5)


def test_a_start_leaves_out_a_checkpoint_whose_configuration_is_zeros(tmp_path: Path, packed: Path) -> None:
    """As where any other file of it has lost its content: with a word, from the one before it, to the same end."""
    settings = {"every_steps": 2, "keep_last": 100}
    config = load_config(write_tiny(tmp_path, packed, train={"epochs": 1, "batch_size": 6}, checkpoint=settings))
    engine.train(config, Runtime(config.train))
    root = tmp_path / "runs" / "tiny" / "checkpoints"
    before, last = checkpoints(root)[-2:]
    unbroken = load_checkpoint(last).model
    told = last / "config.yaml"
    told.write_bytes(bytes(told.stat().st_size))
    reset()
    check_experiment(config, 1)
    engine.train(config, Runtime(config.train))
    log = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert f"{last}: the checkpoint is damaged (config.yaml has other content than was saved): it is left out" in log
    assert f"resuming from {before}" in log
    again = load_checkpoint(last).model
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)
