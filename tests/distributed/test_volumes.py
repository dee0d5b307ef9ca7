"""What an engine really sends in a step is what the projections' formulas say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import zero
from tests.experiments import write_tiny
from tests.worlds import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"accumulation": 3},
    "zero0": zero(0, accumulation=3),
    "zero1": zero(1, accumulation=3),
    "zero2": zero(2, accumulation=3),
    "zero3": zero(3, accumulation=3),
}
OWN_BYTES = 2000  # the loss, the norm, a flag: numbers of our own and of DeepSpeed, not tensors of the network


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
    torchrun("tests.distributed.volumes", [str(file)], ranks=2, deadline_s=300)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_sent_is_what_the_formula_says(name: str, told: dict[str, Any]) -> None:
    counted, formula = (by_kind(told[name][key]) for key in ("counted", "formula"))
    assert set(formula) <= set(counted), counted
    for kind, payload in counted.items():
        assert payload == pytest.approx(formula.get(kind, 0), rel=0.01, abs=OWN_BYTES), (kind, told[name])


def test_the_same_collectives_take_time_alone(told: dict[str, Any]) -> None:
    assert all(0 < one["seconds_alone"] < 60 for one in told.values())


def by_kind(parts: list[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in parts:
        found[part["kind"]] += part["payload_bytes"]
    return found
