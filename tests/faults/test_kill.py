"""SIGKILL of one rank at any moment: the run, restarted each time, ends as an unbroken one, to the last bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from msmil.engine.checkpoint_state import newest
from tests.faults.experiments import write_full
from tests.faults.launcher import Launcher, digests, half_written, kill_inside_a_save, left_behind, poll
from tests.faults.places import step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEP_S = 0.05


def test_killed_five_times_it_ends_like_an_unbroken_run(launcher: Launcher, tmp_path: Path, packed: Path) -> None:
    """Four moments are drawn uniformly over the steps; the fifth is inside a save. One start has decoding processes."""
    config = write_full(tmp_path, packed, "unbroken")
    assert launcher.wait(launcher.start(config)) == [0, 0]
    unbroken = newest(tmp_path / "runs" / "unbroken" / "checkpoints")
    assert unbroken is not None
    last = json.loads((unbroken / "state.json").read_text())["train_state"]["step"]

    config, checkpoints = write_full(tmp_path, packed, "killed"), tmp_path / "runs" / "killed" / "checkpoints"
    draw = random.Random(6)
    moments: list[float | None] = sorted(draw.uniform(0, last) for _ in range(4))
    for number, moment in enumerate([*moments[:2], None, *moments[2:]]):
        started = launcher.start(config, f"data.workers={int(number == 1)}")
        victim = 0 if moment is None else draw.randrange(2)
        if moment is None:
            kill_inside_a_save(started, checkpoints, deadline_s=60)
        else:
            poll(lambda s=started, m=moment, v=victim: step_of(s.place(v)) > m, deadline_s=60)
            time.sleep(moment % 1 * STEP_S)
            started.send(signal.SIGKILL, victim)
        by_itself = number == 3
        codes = launcher.wait(started, end_others=not by_itself)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] in ((1,) if by_itself else (1, -signal.SIGTERM)), started.said(1 - victim)
        assert "Traceback" not in started.said(1 - victim)
        poll(lambda s=started: left_behind(s) == [], deadline_s=10)
        if moment is None:
            assert half_written(started, checkpoints), "it died inside a save: what it wrote has no final name"
    assert launcher.wait(launcher.start(config)) == [0, 0]
    found = newest(checkpoints)
    assert found is not None
    assert found.name == unbroken.name
    assert digests(found) == digests(unbroken)
    assert set(digests(found)) == {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}
    assert not list(checkpoints.glob(".*"))
