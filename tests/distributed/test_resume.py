"""A run that is cut and goes on equals an unbroken one: to the last bit on the same ranks, in its losses on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import Runs, zero

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # worlds have deadlines of their own

CUT, END = 5, 12
VALIDATED = [0, 3, END]
DROPOUT = {"encoder_dropout": 0.3, "attention_dropout": 0.2}
EMA = {"ema_decay": 0.9}
SOON = {"every_minutes": 1e-3}  # 0.06 s
SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp_2": (2, {**EMA}),
    "ddp_3": (3, {**EMA, "accumulation": 2}),
    "zero_1": (2, zero(1, **EMA)),
    "zero_2": (2, zero(2, **EMA)),
    "zero_3": (2, zero(3)),
}
CHANGES: list[tuple[int, int, dict[str, Any]]] = [
    (2, 4, {}),
    (2, 7, zero(1)),
    (2, 10, zero(3)),
    (2, 12, zero(2)),
    (2, 14, zero(0)),
    (1, 17, {}),
    (3, 20, {}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Runs:
    """Each run unbroken, validated now and then, and cut; and one run whose ranks and engine change."""
    runs = Runs(tmp_path_factory.mktemp("resume"), packed)
    legs: dict[int, list[dict[str, Any]]] = {1: [], 2: [runs.leg("unbroken", 20, checkpoint=SOON)], 3: []}
    for name, (ranks, train) in SAME.items():
        more = {"train": train, "model": DROPOUT, "threshold": 0}
        legs[ranks].append(runs.leg(name, END, validates=VALIDATED, **more))
        legs[ranks] += [runs.leg(f"{name}_{step}", step, run=f"{name}_cut", **more) for step in (CUT, END)]
    for n, (ranks, until, train) in enumerate(CHANGES):
        legs[ranks].append(runs.leg(f"changes_{n}", until, run="changes", train=train, threshold=0))
    for ranks in (2, 1, 3):
        runs.train(ranks, legs[ranks])
    return runs


@pytest.mark.parametrize("name", SAME)
def test_on_the_same_ranks_it_is_equal_to_the_last_bit(runs: Runs, name: str) -> None:
    """Validations, of which the cut one has none, change nothing either: before the first step, and before a save."""
    assert runs.told(f"{name}_{END}").start == CUT
    unbroken, cut = runs.saved(name, END), runs.saved(f"{name}_cut", END)
    kinds = {key.partition("/")[0] for key in unbroken}
    assert kinds == {"model", "optimizer"} | ({"ema"} if name != "zero_3" else set())
    assert unbroken.keys() == cut.keys()
    for key, tensor in unbroken.items():
        assert torch.equal(tensor, cut[key]), key


def test_on_other_ranks_and_engines_the_samples_go_on_exactly_and_losses_agree(runs: Runs) -> None:
    parts = [runs.told(f"changes_{n}") for n in range(len(CHANGES))]
    assert [part.world for part in parts] == [ranks for ranks, _, _ in CHANGES]
    assert [part.start for part in parts] == [0, *(until for _, until, _ in CHANGES[:-1])]
    unbroken = runs.told("unbroken")
    assert [step for part in parts for step in part.samples] == unbroken.samples
    assert [loss for part in parts for loss in part.losses] == pytest.approx(unbroken.losses, rel=1e-5)


def test_ranks_agree_when_a_checkpoint_is_due_by_the_clock(runs: Runs) -> None:
    first, second = runs.told("unbroken").due
    assert first == second
    assert first[-1] == 20
    assert runs.told("ddp_2").due == [[], []]


def test_what_should_be_on_is_on(runs: Runs) -> None:
    """Dropout moves the losses, averaged weights are not the weights, and augmentation changes pixels."""
    assert runs.told("ddp_2").losses != pytest.approx(runs.told("unbroken").losses[:END], rel=1e-3)
    saved = runs.saved("ddp_2", END)
    key = next(key for key in saved if key.startswith("model/") and key.endswith("weight"))
    assert not torch.equal(saved[key], saved[key.replace("model/", "ema/module.")])
