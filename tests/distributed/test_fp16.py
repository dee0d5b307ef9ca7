"""fp16 under DeepSpeed: torch's autocast over fp32 weights, and a loss scale of ours. DDP has torch's GradScaler, which
needs a GPU (tests/gpu); what is shown here is computed by CPUs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msmil.engine.loss_scale import LossScale
from msmil.reporting.curves import read_curves
from tests.distributed.runs import Runs, zero

STEPS = 8
LARGE = 2.0**60  # no gradient of fp16 bears it
OVERFLOWS = 3
STAGES = (0, 2, 3)  # stage 1 is DeepSpeed's code of stage 2
slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(600)  # worlds have deadlines of their own


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("fp16"), packed)
    fp16 = {"precision": "fp16", "accumulation": 3}
    fp32, end = zero(2, accumulation=3), {"validates": [STEPS]}
    legs = [runs.leg("fp32", STEPS, train=fp32, **end), runs.leg("start", 1, train=fp32)]
    for stage in STAGES:
        words = {"train": zero(stage, **fp16), "threshold": 0}
        legs.append(runs.leg(f"zero{stage}", STEPS, **words, **end))
        legs.append(runs.leg(f"over{stage}", OVERFLOWS, scale=LARGE, **words))
        legs.append(runs.leg(f"on{stage}", OVERFLOWS + 1, run=f"over{stage}", scale=1.0, **words))
    runs.train(2, legs)
    return runs


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_fp32_to_its_rounding(runs: Runs, stage: int) -> None:
    """fp16 has eleven bits of mantissa: losses of 8 steps, and of the validation behind them, agree to 0.2 %."""
    told, one = runs.told(f"zero{stage}"), runs.told("fp32").losses
    assert told.skipped == 0
    assert told.losses == pytest.approx(one, rel=2e-3)
    assert told.losses != pytest.approx(one, rel=1e-6), "it did not compute in fp16"
    assert max(one) / min(one) > 1.1, "otherwise this shows nothing"
    curves = [read_curves(runs.folder / "runs" / name / "tensorboard").scalars for name in (f"zero{stage}", "fp32")]
    [validated], [expected] = (scalars["val/loss/total"][1].tolist() for scalars in curves)
    assert validated == pytest.approx(expected, rel=2e-3)
    assert validated != pytest.approx(expected, rel=1e-6), "its validation did not compute in fp16"


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_overflow_change_nothing_but_the_scale(runs: Runs, stage: int) -> None:
    """Of three updates none was done; what is saved is what the run began with."""
    assert runs.told(f"over{stage}").skipped == OVERFLOWS
    losses = runs.told("start").losses
    assert runs.told(f"over{stage}").losses[:1] == pytest.approx(losses, rel=2e-3)
    saved = runs.saved(f"over{stage}", OVERFLOWS)
    moments = {key for key, x in saved.items() if key.startswith("optimizer/") and "exp_avg" in key and x.any()}
    assert not moments
    first = runs.saved("over0", OVERFLOWS)
    for key, weight in saved.items():
        if key.startswith("model/"):
            assert torch.equal(weight, first[key])
    assert saved_scale(runs, f"over{stage}", OVERFLOWS) == LARGE / 2**OVERFLOWS


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_with_its_scale(runs: Runs, stage: int) -> None:
    assert runs.told(f"on{stage}").skipped == 1, "with a fresh scale it would not overflow"
    assert saved_scale(runs, f"over{stage}", OVERFLOWS + 1) == LARGE / 2 ** (OVERFLOWS + 1)


def saved_scale(runs: Runs, run: str, step: int) -> float:
    [file] = (runs.folder / "runs" / run / "checkpoints" / f"step_{step:08d}").glob("*.json")
    return float(json.loads(file.read_text())["loss_scale"]["scale"])


def test_the_scale_follows_the_rule_of_gradscaler() -> None:
    """torch's own, on a CPU, fed with the same overflows; and its state can be taken over in the middle."""
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(None)
    ours._state["growth_interval"] = 3
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(40):
        overflowed = step in (2, 3, 9, 17, 18, 30)
        theirs.scale(parameter.sum() * (float("inf") if overflowed else 1)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflowed=overflowed)
        assert ours.state_dict() == theirs.state_dict()
        assert ours.value == theirs.get_scale()
        ours = LossScale(theirs.state_dict())
    fresh = torch.amp.GradScaler("cpu")
    fresh.scale(parameter.sum())
    assert LossScale(None).state_dict() == fresh.state_dict()
