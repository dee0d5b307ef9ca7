"""Two ranks under DDP train as one does on the same global batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # worlds have deadlines of their own

STEPS = 20


def test_gradients_and_losses_are_those_of_one_rank(tmp_path: Path, packed: Path) -> None:
    runs = Runs(tmp_path, packed)
    runs.train(1, [runs.leg("one", STEPS)])
    runs.train(2, [runs.leg("two", STEPS), runs.leg("accumulated", STEPS, train={"accumulation": 3})])
    one = runs.told("one")
    assert len(one.losses) == STEPS
    for name in ("two", "accumulated"):
        told = runs.told(name)
        assert told.world == 2
        told.agrees_with(one, bound=1e-5)
