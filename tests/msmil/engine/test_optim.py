"""Parameter groups, the learning rate as a function of the step, Adam's moments by name, averaged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from msmil.config import OptimConfig
from msmil.engine.optim import (
    build_ema,
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "parity" / "data" / "data.json").read_text())["lr_multiplier"]


class Net(nn.Module):
    """A backbone with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).mean(dim=(2, 3)))


def a_step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['total_steps']}_steps")
def test_the_learning_rate_follows_the_published_schedule(case: dict[str, object]) -> None:
    steps, warmup = int(str(case["total_steps"])), int(str(case["warmup_steps"]))
    ours = [learning_rate_factor(step, total_steps=steps, warmup_steps=warmup) for step in range(steps)]
    assert ours == pytest.approx(case["multipliers"], abs=1e-8)


def test_the_backbone_learns_slower_and_norms_and_biases_do_not_decay() -> None:
    config = OptimConfig(lr=1e-2, backbone_lr_factor=0.1, weight_decay=0.5)
    groups = {g["name"]: (g["base_lr"], g["weight_decay"], len(g["params"])) for g in parameter_groups(Net(), config)}
    assert groups == {
        "backbone/decay": (pytest.approx(1e-3), 0.5, 1),
        "backbone/no_decay": (pytest.approx(1e-3), 0.0, 3),
        "head/decay": (1e-2, 0.5, 1),
        "head/no_decay": (1e-2, 0.0, 1),
    }


def test_frozen_parameters_are_in_no_group() -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    assert {g["name"] for g in parameter_groups(net, OptimConfig())} == {"head/decay", "head/no_decay"}


def test_setting_the_learning_rate_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(Net(), OptimConfig(lr=1.0, backbone_lr_factor=0.1))
    set_learning_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["backbone/decay"] == pytest.approx(0.05)


def test_moments_by_name_continue_the_optimizer_exactly() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(net, OptimConfig(lr=1e-2))
    a_step(net, optimizer, 1)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = build_optimizer(other, OptimConfig(lr=1e-2))
    load_optimizer_tensors(
        other, resumed, {key: value.clone() for key, value in optimizer_tensors(net, optimizer).items()}
    )
    for pair in ((net, optimizer), (other, resumed)):
        a_step(*pair, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_parameters_that_were_frozen_start_with_fresh_moments() -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    optimizer = build_optimizer(net, OptimConfig())
    a_step(net, optimizer, 1)
    moments = optimizer_tensors(net, optimizer)
    assert {key.partition(".")[0] for key in moments} == {"head"}
    net.backbone.requires_grad_(True)
    later = build_optimizer(net, OptimConfig())
    load_optimizer_tensors(net, later, moments)
    assert set(optimizer_tensors(net, later)) == set(moments)


def test_averaged_weights_follow_the_decay() -> None:
    net = Net()
    ema = build_ema(net, 0.75)
    assert ema is not None
    ema.update_parameters(net)
    before = net.head.weight.detach().clone()
    with torch.no_grad():
        net.head.weight.add_(1.0)
    ema.update_parameters(net)
    assert torch.allclose(ema.module.head.weight, before + 0.25)
    assert build_ema(net, 0.0) is None
