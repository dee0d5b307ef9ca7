"""The same global batches give the same training: on any number of ranks, under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import Runs, zero

pytestmark = pytest.mark.slow

STEPS = 20
ENGINES = {
    "ddp": {},
    "accumulation": {"accumulation": 3},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "offload": zero(2, offload_optimizer=True),
}
WORLDS = [(2, name) for name in ENGINES] + [(3, "double")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Runs:
    """One rank; two ranks under every engine; three under DDP."""
    runs = Runs(tmp_path_factory.mktemp("engines"), packed)
    bf16 = {"precision": "bf16"}
    runs.train(1, [runs.leg("one", STEPS), runs.leg("one_double", STEPS, dtype="float64")])
    legs = [runs.leg(name, STEPS, train=words, threshold=0) for name, words in ENGINES.items()]
    legs += [runs.leg("bf16", STEPS, train=bf16), runs.leg("zero2_bf16", STEPS, train=zero(2, **bf16))]
    runs.train(2, legs)
    runs.train(3, [runs.leg("double", STEPS, dtype="float64")])
    return runs


@pytest.mark.parametrize(("ranks", "name"), WORLDS)
def test_gradients_losses_and_samples_are_those_of_one_rank(runs: Runs, ranks: int, name: str) -> None:
    told, one = runs.told(name), runs.told("one_double" if name == "double" else "one")
    bound = 1e-10 if name == "double" else 1e-5
    assert (told.world, len(told.losses)) == (ranks, STEPS)
    assert told.samples == one.samples
    assert told.losses == pytest.approx(one.losses, rel=bound)
    assert told.gradients.keys() == one.gradients.keys()
    for key, gradient in one.gradients.items():
        difference = (told.gradients[key] - gradient).norm()
        if key.endswith("score.bias"):  # softmax does not feel it: its gradient is rounding noise around 0
            assert max(difference, gradient.norm()) < 1e-7
        else:
            assert gradient.norm() > 1e-7, f"{key} has no gradient to compare"
            assert difference <= bound * gradient.norm(), f"{key}: {difference / gradient.norm():.1e}"


def test_in_bf16_engines_differ_by_its_rounding(runs: Runs) -> None:
    """bf16 has eight bits of mantissa: losses of 20 steps agree to 1 %."""
    one = runs.told("one").losses
    for name in ("bf16", "zero2_bf16"):
        assert runs.told(name).losses == pytest.approx(one, rel=1e-2)
        assert runs.told(name).losses != pytest.approx(one, rel=1e-5), f"{name} did not compute in bf16"


def test_the_comparison_can_fail(runs: Runs) -> None:
    """Losses move from step to step by far more than the bounds."""
    losses = runs.told("one").losses
    assert max(losses) / min(losses) > 1.1


def test_every_epoch_is_exact(runs: Runs) -> None:
    """Each training image once per epoch, and in another order the next time."""
    told = runs.told("ddp")
    rows = [[row for row, _ in step] for step in told.samples]
    per_epoch = len({row for step in rows for row in step}) / 6
    count = -(-int(per_epoch * 6) // 6)
    first = sorted(row for step in rows[:count] for row in step)
    assert first == sorted(set(first))
    assert rows[:3] != rows[count : count + 3]
