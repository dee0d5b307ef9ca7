"""Progress: a bar on a terminal, few plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest

from shards import progress as module
from shards.progress import progress


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)


def test_without_a_terminal_it_writes_a_last_line_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "packing", "images") as bar:
        for _ in range(3):
            bar.update()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "packing: 3/3 images (100 %) in 0 s\n"


def test_lines_come_per_tenth_but_not_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with progress(100, "packing", "images") as bar:
        for _ in range(100):
            clock.now_s += 0.125
            bar.update()
    shares = [line.split("(")[1].split(" %")[0] for line in capsys.readouterr().err.splitlines()]
    assert shares == ["40", "80", "100"]


def test_slow_work_writes_a_line_every_minute_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with progress(1000, "packing", "images") as bar:
        for _ in range(3):
            clock.now_s += 60
            bar.update(5)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "packing: 5/1000 images (0 %) in 60 s, about 11940 s left"


def test_quiet_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "packing", "images", quiet=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(2, "packing", "images") as bar:
        bar.update(2)
    assert "packing: 100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_an_error_inside_is_not_followed_by_a_line_that_looks_like_success(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress(3, "packing", "images") as bar:
            bar.update()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work()
    assert capsys.readouterr().err == ""
