"""Under another launcher the cause of an end is the last line of the log, once for all ranks that have it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.ranks import cause_in
from msmil.engine.preemption import Stopped
from shards.errors import UserError


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MSMIL_FAILURE_FILE", raising=False)
    (tmp_path / "log.txt").write_text("epoch 3: loss 0.4\n")
    return tmp_path / "log.txt"


def ends(log: Path, *errors: Exception) -> list[str]:
    """What is added to the log when one rank after another ends by an error."""
    before = log.read_text()
    for error in errors:
        with pytest.raises(type(error)), cause_in(log):
            raise error
    assert log.read_text().startswith(before)
    return log.read_text()[len(before) :].splitlines()


def test_ranks_with_the_same_mistake_say_it_once(log: Path) -> None:
    error = UserError("changed", file="a.tar", fix="copy it again")
    assert ends(log, error, error) == [f"msmil: error: {error}"]


def test_ranks_that_stop_together_say_it_once(log: Path) -> None:
    (line,) = ends(log, Stopped(signal.SIGTERM, 7), Stopped(signal.SIGTERM, 7))
    assert line == "msmil: stopped by SIGTERM behind step 7; the same command again goes on where it stopped"


def test_a_crash_is_named_with_its_rank_and_what_it_tears_down_is_not(log: Path) -> None:
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    (line,) = ends(log, ValueError("wrong shape\nand more"), lost)
    assert line.startswith("msmil: rank 1 (pid ")
    assert line.endswith("ended by ValueError: wrong shape")


def test_the_launcher_of_ours_says_it_itself(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSMIL_FAILURE_FILE", str(log.with_name("failure.txt")))
    assert ends(log, UserError("changed", fix="copy it again")) == []


def test_without_a_log_nothing_is_written(tmp_path: Path, log: Path) -> None:
    log.unlink()
    with pytest.raises(UserError), cause_in(log):
        raise UserError("changed", fix="copy it again")
    assert not log.exists()
