"""The engine that a configuration asks for. An engine trains one set of parameters of a bare module on all ranks, and
gives its state in a form that knows no engine and no number of ranks: whole weights, moments by parameter name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msmil.engine.ddp import DdpEngine
from msmil.engine.pipeline import Pipeline
from msmil.engine.zero import ZeroEngine

Engine = DdpEngine | ZeroEngine


def make_engine(
    pipeline: Pipeline,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    moments: dict[str, Tensor],
    loss_scale: Mapping[str, Any] | None,
) -> Engine:
    """The engine of the configuration for the parameters of `module` that require a gradient.

    Args:
        pipeline: configuration and ranks.
        module: the bare network, on the device, with the weights to start from.
        optimizer: AdamW over its trainable parameters.
        moments: Adam's, by parameter name; a parameter without any starts fresh.
        loss_scale: of fp16, to go on with.
    """
    train, clip = pipeline.config.train, pipeline.config.optim.clip_grad_norm
    if train.engine == "ddp":
        return DdpEngine(
            pipeline.runtime, module, optimizer, moments=moments, loss_scale=loss_scale, compiled=train.compile
        )
    return ZeroEngine(
        pipeline.runtime,
        module,
        optimizer,
        moments=moments,
        fp16=train.precision == "fp16",
        loss_scale=loss_scale,
        stage=train.zero_stage,
        accumulation=train.accumulation,
        clip_grad_norm=clip,
    )
