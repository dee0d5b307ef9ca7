"""The curves of a run that was started several times."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from msmil.engine.saving import Saver
from msmil.engine.tracking import Tracker, _date_before
from msmil.reporting.curves import read_curves
from shards.errors import UserError


@pytest.mark.parametrize("behind_s", [0, 3600], ids=["within a second", "where a clock is behind"])
def test_later_starts_continue_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind_s: int) -> None:
    now_s = time.time()
    (tmp_path / "events.out.tfevents.of_somebody").touch()
    for start, first in enumerate((0, 2, 3)):  # the last steps of a start were not saved: they are trained again
        monkeypatch.setattr(time, "time", lambda start=start: now_s - start * behind_s)
        monkeypatch.setattr(os, "getpid", lambda start=start: 9999 + start)  # a part of the name of the file
        tracker = Tracker(tmp_path, start_step=first, total_steps=9, failed=pytest.fail)
        for step in range(first + 1, first + 4):
            tracker.scalars({"loss": float(start)}, step)
        tracker.close()
    steps, values = read_curves(tmp_path).scalars["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert values.tolist() == [0, 0, 1, 2, 2, 2]


def test_no_file_of_curves_takes_the_place_of_another(tmp_path: Path) -> None:
    """In a container every start may have the same machine and process in its name."""
    for second in (1000, 1001, 1030):
        (tmp_path / f"events.out.tfevents.{second:010d}.host.7.0").write_text(str(second))
    _date_before(tmp_path, 1001)
    files = sorted(tmp_path.iterdir())
    assert [file.read_text() for file in files] == ["1000", "1001", "1030"]
    assert max(files).name < "events.out.tfevents.0000001001"


def test_curves_that_cannot_be_written_are_told_to_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one rank writes them: it goes on, and all stop at the next step, as for a checkpoint."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(every_minutes=0)
    tracker = Tracker(tmp_path, start_step=0, total_steps=9, failed=saver.fail)
    with monkeypatch.context() as patch:
        patch.setattr(tracker._writer._get_file_writer(), "add_summary", full)
        tracker.scalars({"loss": 1.0}, 1)
    tracker.close()
    assert saver.failed
    with pytest.raises(UserError, match=r"curves cannot be written .*No space left.*Fix: free space"):
        saver.wait()
    assert not saver.failed
