"""`msmil runs`: every state of a run, without torch, and without failing on what is broken."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from msmil.config import Config
from msmil.config_io import dump_config
from msmil.engine.run_folder import RunFolder
from msmil.engine.run_list import find_runs, read_run
from msmil.types import TrainState
from shards.errors import UserError

STATE = TrainState(
    step=30, epoch=3, batches_done=0, samples_seen=240, best_metric=0.75, best_step=20, data_fingerprint="f"
)
BEST, NEWEST = "step_00000020", "step_00000030"
STATE_FILE = f"checkpoints/{NEWEST}/state.json"
ERROR = "msmil: error: {}. Fix: do something about it"


def write_run(folder: Path, *, epochs: int = 3, log: str = "all is well", version: int = 1, **state: Any) -> Path:
    """A run as training leaves it, with two checkpoints."""
    config = replace(Config(), train=replace(Config().train, epochs=epochs))
    for name in (BEST, NEWEST):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        content = {"format_version": version, "train_state": asdict(STATE) | state, "loss_scale": None}
        (checkpoint / "state.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "checkpoints" / "best").write_text(f"{BEST}\n", encoding="utf-8")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "log.txt").write_text(f"2026-01-01 INFO epoch 3 of 3\n{log}\n", encoding="utf-8")
    return folder


def write_metrics(folder: Path, **changes: Any) -> None:
    results = {"mean_auroc": 0.7, "checkpoint": BEST, "data_fingerprint": "f", "other_data_than_trained_on": False}
    (folder / "metrics").mkdir()
    (folder / "metrics" / "test.json").write_text(json.dumps(results | changes), encoding="utf-8")


def listed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    """What `msmil runs --json` prints, by the name of the folder."""
    assert main(["runs", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    return {Path(row["folder"]).name: row for row in rows}


@contextmanager
def lock(folder: Path, kind: int) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, kind)
        yield


def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "trained")
    write_metrics(write_run(tmp_path / "evaluated"))
    write_run(tmp_path / "stopped", epochs=5)
    write_run(tmp_path / "interrupted", epochs=5, log="msmil: the launcher was killed by SIGINT; the same command ..")
    write_run(tmp_path / "failed", epochs=5, log=ERROR.format("the disk is full"))
    write_run(tmp_path / "killed", epochs=5, log="msmil: rank 1 (pid 7) was killed by SIGKILL; the same command ..")
    shutil.rmtree(write_run(tmp_path / "new") / "checkpoints")
    shutil.rmtree(write_run(tmp_path / "refused", log=ERROR.format("no such file")) / "checkpoints")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.yaml").touch()
    (tmp_path / "weights" / "model.safetensors").touch()
    with lock(write_run(tmp_path / "training", epochs=5), fcntl.LOCK_EX):
        found = listed(capsys, tmp_path)
    assert {name: row["state"] for name, row in found.items()} == {
        "evaluated": "evaluated",
        "failed": "failed",
        "interrupted": "stopped",
        "killed": "failed",
        "new": "no checkpoint",
        "refused": "failed",
        "stopped": "stopped",
        "trained": "trained",
        "training": "training",
        "weights": "converted",
    }
    assert found["failed"]["note"] == "the disk is full"
    assert "SIGKILL" in found["killed"]["note"]
    assert "SIGINT" in found["interrupted"]["note"]


def test_progress_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(write_run(tmp_path / "run", epochs=5, batches_done=6, step=36))
    row = listed(capsys, tmp_path)["run"]
    assert (row["epoch"], row["epochs"], row["step"], row["total_steps"]) == (3, 5, 36, 50)
    assert (row["best_auroc"], row["best_step"], row["test_auroc"]) == (0.75, 20, 0.7)
    assert main(["runs", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[2:9] == ["3/5", "36/50", "0.750", "@", "20", "0.700", "now"] or "s ago" in line


def test_without_validation_and_with_undefined_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "first", epoch=0, batches_done=3, step=3, best_metric=None, best_step=None)
    write_metrics(first, mean_auroc=None)
    write_metrics(write_run(tmp_path / "nan", best_metric=float("nan")), mean_auroc=float("nan"))
    found = listed(capsys, tmp_path)
    for row in found.values():
        assert (row["best_auroc"], row["test_auroc"]) == (None, None)
    assert found["first"]["total_steps"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": NEWEST}, f"is of {NEWEST}, the best is {BEST}"),
        ({"data_fingerprint": "other"}, "is of other data"),
        ({"other_data_than_trained_on": True}, "is of other data"),
    ],
)
def test_a_test_metric_of_something_else_is_said(
    tmp_path: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(write_run(tmp_path / "run"), **changes)
    row = listed(capsys, tmp_path)["run"]
    assert row["test_auroc"] == 0.7
    assert said in row["note"]


def cut(file: str) -> Callable[[Path], None]:
    def half(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return half


def old_configuration(folder: Path) -> None:
    (folder / "config.yaml").write_text("epochs: 3\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: [cut(f"checkpoints/{name}/state.json")(folder) for name in (BEST, NEWEST)], "is cut off"),
        (lambda folder: (folder / "config.yaml").unlink(), "no config.yaml"),
        (lambda folder: (folder / "config.yaml").write_bytes(b"a: [\xff"), "config.yaml cannot be read"),
        (old_configuration, "names no train.epochs"),
    ],
)
def test_a_broken_run_says_so_in_its_row(
    tmp_path: Path, damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "whole")
    damage(write_run(tmp_path / "broken"))
    found = listed(capsys, tmp_path)
    assert found["whole"]["state"] == "trained"
    assert found["broken"]["state"] == "unreadable"
    assert said in found["broken"]["note"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut(STATE_FILE), "cut off"), (lambda folder: (folder / STATE_FILE).unlink(), "missing")],
)
def test_a_newest_checkpoint_that_is_cut_off_is_said_and_the_one_before_tells_the_progress(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(write_run(tmp_path / "run"))
    row = read_run(tmp_path / "run")
    assert row.state == "trained"
    assert row.note == f"{NEWEST} is cut off (state.json is {said})"


def test_another_version_says_so_in_its_row(tmp_path: Path) -> None:
    row = read_run(write_run(tmp_path / "old", version=0))
    assert row.state == "unreadable"
    assert row.note.startswith("checkpoint format version 0. Fix: use the msmil release that wrote it")


def test_a_folder_of_somebody_else_says_so_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: RunFolder) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RunFolder, "in_training", refused)
    row = read_run(write_run(tmp_path / "run"))
    assert (row.state, row.note) == ("unreadable", "cannot be read (Permission denied)")


def test_metrics_that_were_cut_off_are_no_metrics(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "run"))
    cut("metrics/test.json")(tmp_path / "run")
    row = read_run(tmp_path / "run")
    assert (row.state, row.test_auroc, row.note) == ("trained", None, "metrics/test.json cannot be read")


@pytest.mark.parametrize(
    "text", ["the loss is not finite; the batch held the samples P1, P2", "sample P1 (row 3): changed"]
)
def test_no_image_is_named(tmp_path: Path, text: str) -> None:
    row = read_run(write_run(tmp_path / "run", epochs=5, log=ERROR.format(text)))
    assert row.state == "failed"
    assert "P1" not in row.note
    assert row.note.endswith((" samples ...", "sample ..."))


def test_runs_of_repeat_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("a/run_10", "a/run_2", "b"):
        write_run(tmp_path / name)
    (tmp_path / "a" / "summary.csv").touch()
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/run_2", "a/run_10", "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run folders" in capsys.readouterr().out
    assert listed(capsys, tmp_path) == {}
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_looking_at_a_lock_does_not_disturb_a_training_that_starts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    held = threading.Event()

    def look() -> None:
        with lock(folder, fcntl.LOCK_SH):
            held.set()
            time.sleep(0.2)

    looker = threading.Thread(target=look)
    looker.start()
    held.wait()
    training = RunFolder(folder)
    training.open(world=1, device="CPU")
    looker.join()
    assert RunFolder(folder).in_training()
    with pytest.raises(UserError, match="another process trains"):
        RunFolder(folder).open(world=1, device="CPU")
    training.close()
    assert not RunFolder(folder).in_training()


def test_a_hundred_runs_are_a_hundred_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run_0")
    for number in range(1, 100):
        shutil.copytree(tmp_path / "run_0", tmp_path / f"run_{number}")
    assert len(listed(capsys, tmp_path)) == 100
