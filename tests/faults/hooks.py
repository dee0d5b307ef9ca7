"""Faults that a rank causes itself: called as hook(rank, folder) in each forked rank before it trains."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import msmil.engine.predict
import msmil.engine.runtime as runtime_module
from msmil.engine.ddp import DdpEngine
from msmil.engine.losses import BagLoss, LossParts
from msmil.engine.runtime import Runtime
from msmil.engine.step import Stepper, StepReport
from shards.errors import UserError

NAN_STEP, NAN_MICRO, ACCUMULATION = 2, 1, 2  # counted from 0


def nan_loss_of_rank_1(rank: int, folder: Path) -> None:
    """One micro-step's loss is NaN on rank 1; each rank writes digests of its parameters around the step that fails."""
    calls = -1  # the discarded backward at the start is no step
    forward = BagLoss.forward

    def broken(self: BagLoss, *arguments: Any, **more: Any) -> LossParts:
        nonlocal calls
        parts, calls = forward(self, *arguments, **more), calls + 1
        strikes = rank == 1 and calls == NAN_STEP * ACCUMULATION + NAN_MICRO + 1
        return replace(parts, total=parts.total * float("nan")) if strikes else parts

    BagLoss.forward = broken  # type: ignore[method-assign]
    watch_parameters(rank, folder)


def infinite_gradient_of_rank_1(rank: int, folder: Path) -> None:
    """One number of one gradient is infinite on rank 1, behind losses that are finite; digests as above."""
    watch_parameters(rank, folder)
    call = Stepper.__call__

    def broken(self: Stepper, *arguments: Any, **more: Any) -> StepReport:
        if rank == 1 and more["step"] == NAN_STEP:
            parameter = next(p for p in self.module.parameters() if p.requires_grad)
            parameter.register_hook(one_infinite)
        return call(self, *arguments, **more)

    Stepper.__call__ = broken  # type: ignore[method-assign]


def one_infinite(gradient: Tensor) -> Tensor:
    """The gradient, of which one number is too large."""
    gradient = gradient.clone()
    gradient.view(-1)[0] = float("inf")
    return gradient


def watch_parameters(rank: int, folder: Path) -> None:
    """Write digests of what a step that fails found and left."""
    call = Stepper.__call__

    def watched(self: Stepper, *arguments: Any, **more: Any) -> StepReport:
        before = digest(self.module)
        try:
            return call(self, *arguments, **more)
        except UserError:
            told = {"step": more["step"], "before": before, "after": digest(self.module)}
            (folder / f"parameters_{rank}.json").write_text(json.dumps(told))
            raise

    Stepper.__call__ = watched  # type: ignore[method-assign]


def hanging_step(rank: int, folder: Path) -> None:
    """Rank 1 never answers in its third step: rank 0 waits for it in a collective, where Python runs no handler."""
    call = Stepper.__call__

    def hangs(self: Stepper, *arguments: Any, **more: Any) -> StepReport:
        if rank == 1 and more["step"] == 2:
            (folder / "hangs").touch()
            time.sleep(600)
        return call(self, *arguments, **more)

    Stepper.__call__ = hangs  # type: ignore[method-assign]


def stopped_in_the_settling_step(rank: int, folder: Path) -> None:
    """SIGSTOP of rank 1 in DDP's backward that is thrown away, with rank 0 in front of its all-reduce or in it."""
    stop_rank_1(DdpEngine, "backward", rank, folder)


def stopped_while_the_engine_is_made(rank: int, folder: Path) -> None:
    """SIGSTOP of rank 1 in front of DeepSpeed's initialisation, which tells all ranks the weights of rank 0."""
    stop_rank_1(Runtime, "prepare", rank, folder)


def stopped_between_forwards_of_a_validation(rank: int, folder: Path) -> None:
    """SIGSTOP of rank 1 in front of its second forward, in which rank 0 gathers the weights that they share."""
    made = runtime_module.deepspeed_config

    def dividing(*arguments: Any, **more: Any) -> dict[str, Any]:
        config = made(*arguments, **more)
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        config["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}  # a small network stays whole else
        return config

    runtime_module.deepspeed_config = dividing
    stop_rank_1(msmil.engine.predict, "_forward_batch", rank, folder, call=2)


def stop_rank_1(owner: type | ModuleType, name: str, rank: int, folder: Path, *, call: int = 1) -> None:
    """It stops where it would call this method or function for the first time, or another."""
    method, calls = getattr(owner, name), itertools.count(1)

    def stops(*arguments: Any, **more: Any) -> Any:
        if rank == 1 and next(calls) == call:
            (folder / "stopped_at").write_text(name)
            os.kill(os.getpid(), signal.SIGSTOP)
        return method(*arguments, **more)

    setattr(owner, name, stops)


def stop_request_in_step_2(rank: int, folder: Path) -> None:
    """The scheduler asks rank 1 alone to stop, in its second step."""
    call = Stepper.__call__

    def asked(self: Stepper, *arguments: Any, **more: Any) -> StepReport:
        if rank == 1 and more["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *arguments, **more)

    Stepper.__call__ = asked  # type: ignore[method-assign]


def digest(module: nn.Module) -> str:
    """Of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
