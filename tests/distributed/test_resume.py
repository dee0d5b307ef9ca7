"""A run that is cut and goes on equals an unbroken one: to the last bit on the same ranks, in its losses on others."""

from __future__ import annotations

from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import Runs, zero

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # worlds have deadlines of their own

CUT, END = 3, 7  # an epoch has five steps
VALIDATED = [0, 2, END]
BATCH, ACCUMULATION = 12, 2
DROPOUT = {"encoder_dropout": 0.3, "attention_dropout": 0.2}
EMA = {"ema_decay": 0.9}
SOON = {"every_minutes": 1e-3}  # 0.06 s
SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp_1": (1, EMA),
    "ddp_2": (2, EMA),
    "ddp_3": (3, EMA),
    "zero_0": (2, zero(0, **EMA)),
    "zero_1": (2, zero(1, **EMA)),
    "zero_2": (2, zero(2, **EMA)),
    "zero_3": (2, zero(3)),
    "offload": (2, zero(2, offload_optimizer=True, **EMA)),
}
# each change of ranks among 1, 2 and 3, and of engine between DDP and ZeRO; then ZeRO alone, on others and other ranks
CHANGES: list[tuple[int, int, dict[str, Any]]] = [
    (1, 2, {}),
    (2, 5, zero(1)),
    (3, 7, {}),
    (2, 9, zero(2)),
    (1, 10, {}),
    (3, 12, zero(3)),
    (1, 14, {}),
    (2, 16, zero(3)),
    (3, 18, zero(2)),
    (2, 20, zero(0)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Runs:
    """Each run unbroken, validated now and then, and cut; and one run whose ranks and engine change."""
    runs = Runs(tmp_path_factory.mktemp("resume"), packed)
    legs: dict[int, list[dict[str, Any]]] = {1: [], 2: [runs.leg("unbroken", 20, checkpoint=SOON)], 3: []}
    for name, (ranks, train) in SAME.items():
        words = {"batch_size": BATCH, "accumulation": ACCUMULATION, **train}
        more = {"train": words, "model": DROPOUT, "threshold": 0}
        legs[ranks].append(runs.leg(name, END, validates=VALIDATED, **more))
        legs[ranks] += [runs.leg(f"{name}_{step}", step, run=f"{name}_cut", **more) for step in (CUT, END)]
        if name.startswith("ddp"):
            legs[ranks].append(runs.leg(f"{name}_no_dropout", 1, train=words))
            legs[ranks].append(runs.leg(f"{name}_only_mirrored", 1, train=words, model=DROPOUT, augment={}))
    for ranks in legs:
        runs.train(ranks, legs[ranks])
    for n, (ranks, until, train) in enumerate(CHANGES):
        runs.train(ranks, [runs.leg(f"changes_{n}", until, run="changes", train=train, threshold=0)])
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
    worlds = [part.world for part in parts]
    assert worlds == [ranks for ranks, _, _ in CHANGES]
    assert set(pairwise(worlds)) == set(permutations((1, 2, 3), 2))
    engines = [str(train.get("zero_stage", "ddp")) for _, _, train in CHANGES]
    assert {("ddp", n) for n in "123"} | {(n, "ddp") for n in "123"} <= set(pairwise(engines))
    assert [part.start for part in parts] == [0, *(until for _, until, _ in CHANGES[:-1])]
    unbroken = runs.told("unbroken")
    assert [step for part in parts for step in part.samples] == unbroken.samples
    assert [loss for part in parts for loss in part.losses] == pytest.approx(unbroken.losses, rel=1e-5)


def test_ranks_agree_when_a_checkpoint_is_due_by_the_clock(runs: Runs) -> None:
    first, second = runs.told("unbroken").due
    assert first == second
    assert first[-1] == 20
    assert runs.told("ddp_2").due == [[], []]


@pytest.mark.parametrize("name", SAME)
def test_what_should_be_on_is_on(runs: Runs, name: str) -> None:
    """Steps receive several micro-batches. Without dropout the first loss is another, and so it is where images are
    mirrored as before, but not turned, brightened and made noisy. Averaged weights are not the weights.
    """
    (ranks, train), told = SAME[name], runs.told(name)
    assert told.micro_batches == [[BATCH // ranks // ACCUMULATION] * ACCUMULATION] * END
    for without in ("no_dropout", "only_mirrored"):
        other = runs.told(f"ddp_{ranks}_{without}")
        assert other.samples == told.samples[:1]
        assert other.losses != pytest.approx(told.losses[:1], rel=1e-3)
    assert told.losses[:1] == pytest.approx(runs.told(f"ddp_{ranks}").losses[:1], rel=1e-5), "else the engine did that"
    if "ema_decay" in train:
        saved = runs.saved(name, END)
        key = next(key for key in saved if key.startswith("model/") and key.endswith("weight"))
        assert not torch.equal(saved[key], saved[key.replace("model/", "ema/module.")])
