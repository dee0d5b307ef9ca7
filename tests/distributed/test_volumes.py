"""What an engine really sends in a step is what the projections' formulas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import zero
from tests.experiments import write_tiny
from tests.worlds import world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"accumulation": 3},
    "zero0": zero(0, accumulation=3),
    "zero1": zero(1, accumulation=3),
    "zero2": zero(2, accumulation=3),
    "zero3": zero(3, accumulation=3),
}
NUMBERS_BYTES = 100  # losses and norms, whose bytes the formulas leave out


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> dict[str, Any]:
    """What each engine called on 2 ranks, and the formulas' word."""
    folder = tmp_path_factory.mktemp("volumes")
    legs = [
        {
            "config": str(write_tiny(folder, packed, name=name, train=train)),
            "out": str(folder / f"{name}.json"),
            "threshold": 500,
        }
        for name, train in ENGINES.items()
    ]
    file = folder / "legs.json"
    file.write_text(json.dumps(legs))
    world("tests.distributed.volumes", [str(file)], ranks=2, deadline_s=300)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_called_is_what_the_formula_says(name: str, told: dict[str, Any]) -> None:
    counted, formula = (totals(told[name][key]) for key in ("counted", "formula"))
    assert counted.keys() == formula.keys()
    for kind, (payload, calls) in formula.items():
        assert counted[kind][0] == pytest.approx(payload, rel=1e-3, abs=NUMBERS_BYTES), kind
        assert counted[kind][1] == calls, kind


def test_the_same_collectives_take_time_alone(told: dict[str, Any]) -> None:
    assert all(0 < one["seconds_alone"] < 60 for one in told.values())


def totals(parts: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """{kind: (bytes, calls)}"""
    found: dict[str, tuple[int, int]] = {}
    for part in parts:
        payload, calls = found.get(part["kind"], (0, 0))
        found[part["kind"]] = payload + part["payload_bytes"], calls + part["calls"]
    return found
