"""AdamW over parameter groups, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from msmil.config import OptimConfig

BACKBONE = "backbone."


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Multiplier of the learning rate at a step (0-based): linear from 0 over the warm-up, then cosine to 0.

    The published schedule, cos^2(pi/2 * progress), is the same function: (1 + cos(pi * progress)) / 2.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: {backbone, head} x {decay, no decay}.

    Norms and biases (fewer than two dimensions) have no weight decay; the backbone's learning rate is lr times
    backbone_lr_factor. Each group carries `name` and `base_lr`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "backbone" if name.startswith(BACKBONE) else "head"
        decays = parameter.ndim > 1
        key = f"{part}/{'decay' if decays else 'no_decay'}"
        base_lr = config.lr * (config.backbone_lr_factor if part == "backbone" else 1.0)
        group = groups.setdefault(
            key,
            {
                "name": key,
                "base_lr": base_lr,
                "lr": base_lr,
                "weight_decay": config.weight_decay if decays else 0.0,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over parameter_groups(model, config)."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its base_lr times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    managed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in managed:
            yield name, parameter


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name (`NAME/exp_avg`), independent of engine and ranks."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach()
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors. A parameter without saved moments starts fresh (it was frozen before)."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        by_name.setdefault(name, {})[moment] = value
    for name, parameter in _trained(model, optimizer):
        if found := by_name.get(name):
            # torch keeps the step count on the host unless the optimizer is fused or capturable
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in found.items()
            }


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Averaged weights and buffers, or None when decay is 0."""
    if decay == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
