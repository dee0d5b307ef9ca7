"""A rank of the equality test: trains some steps and, on rank 0, saves their losses and the first gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from msmil.config_io import load_config
from msmil.engine.ddp import DdpEngine
from msmil.engine.engines import Engine
from msmil.engine.run import open_run
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import open_stream, stepper_of_epoch


def main(config_file: str, out: str, steps: int, dtype: torch.dtype) -> None:
    runtime = Runtime((config := load_config(config_file)).train)
    run = open_run(config, runtime)
    assert run.tracker is None or runtime.is_main
    if dtype == torch.float64:
        run.network.double()
    gradients: dict[str, torch.Tensor] = {}
    losses = []
    step = 0
    for epoch in range(config.train.epochs):
        run.stepper = stepper_of_epoch(run, epoch)
        if step == 0:
            keep_gradients(run.stepper.engine, gradients)
        batches = open_stream(run, epoch)
        for _ in range(run.schedule.steps_per_epoch):
            if step < steps:
                report = run.stepper(batches, epoch=epoch, step=step, timer=PhaseTimer(runtime.synchronize))
                losses.append(report.losses["total"])
                step += 1
    if runtime.is_main:
        torch.save({"losses": losses, "gradients": gradients, "world": runtime.world}, Path(out))
    if run.tracker is not None:
        run.tracker.close()
    runtime.close()


def keep_gradients(engine: Engine, gradients: dict[str, torch.Tensor]) -> None:
    """Look at the whole, averaged gradients in front of the first update."""
    update = engine.update

    def look(*arguments: Any, **more: Any) -> tuple[float, bool]:
        if not gradients:
            for name, parameter in engine.module.named_parameters():
                gradient = parameter.grad if isinstance(engine, DdpEngine) else safe_get_full_grad(parameter)
                if parameter.requires_grad and gradient is not None:
                    gradients[name] = gradient.clone()
        return update(*arguments, **more)

    engine.update = look  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(torch, sys.argv[4]))
