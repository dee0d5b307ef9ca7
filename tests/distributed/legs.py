"""A rank that trains several legs of runs, one after another, and writes what each step received and gave.

A leg is {"config": file, "until": step, "out": file, "dtype": "float32", "threshold": parameters below this size stay
whole under ZeRO-3, which then gathers few ahead, as of a large network}. It opens the run as `msmil train` does
(resuming if there is a checkpoint), trains to a step in the middle of an epoch or behind it, and saves. fp16 is let
through on CPUs, where it is slow and nothing else; "scale" is the number that its losses are multiplied with at first.
In front of the steps that "validates" names, and behind the last if it is one of them, it validates as `msmil train`
does. With "predict" the leg then predicts: whole splits, and fewer images than ranks. With "refused" it expects that
the run cannot be opened, and writes what each rank was told.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine import loss_scale as loss_scale_module
from msmil.engine import predict as predict_module
from msmil.engine import runtime as runtime_module
from msmil.engine.ddp import DdpEngine
from msmil.engine.engines import Engine
from msmil.engine.run import Run, open_run, predict_now
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import after_step, finish_saving, open_stream, save, stepper_of_epoch, validate
from shards.errors import UserError
from shards.stream import blank_batch, evaluation_stream
from shards.types import Batch

_CONFIG = runtime_module.deepspeed_config


def main(file: str) -> None:
    for leg in json.loads(Path(file).read_text()):
        train_leg(leg)


def train_leg(leg: dict[str, Any]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[variable]  # accelerate's notes of the engine before
    runtime_module.deepspeed_config = lambda *a, **k: _with_threshold(_CONFIG(*a, **k), leg.get("threshold"))
    config = load_config(leg["config"])
    if config.train.precision == "fp16":
        runtime_module.refuse_on_cpu = lambda _: None
        loss_scale_module._INITIAL["scale"] = leg.get("scale", 2.0**16)
    runtime = Runtime(config.train)
    if leg.get("refused"):
        write_refusals(config, runtime, leg["out"])
        return
    warned: list[str] = []
    logging.getLogger("DeepSpeed").addHandler(handler := _Keeps(warned))
    run = open_run(config, runtime)
    dtype = getattr(torch, leg.get("dtype", "float32"))
    if dtype == torch.float64:
        run.network.double().backbone.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    told: dict[str, Any] = {"world": runtime.world, "start": run.state.step, "losses": [], "samples": [], "due": []}
    told |= {"skipped": 0, "norms": [], "micro_batches": []}
    gradients: dict[str, torch.Tensor] = {}
    validates = leg.get("validates", [])
    while run.state.step < leg["until"]:
        train_epoch_until(run, leg["until"], validates, told, gradients)
    if run.state.step in validates:
        validate(run)
    told["seen"] = run.state.samples_seen
    if told["losses"]:
        save(run)
    finish_saving(run)
    told["due"] = runtime.gather(told["due"])
    if leg.get("predict"):
        run.stepper = run.stepper or stepper_of_epoch(run, run.state.epoch)
        told["predictions"] = predict_all(run)
    told["samples"] = [
        sorted(sample for part in ranks for sample in part)
        for ranks in zip(*runtime.gather(told["samples"]), strict=True)
    ]
    logging.getLogger("DeepSpeed").removeHandler(handler)
    if runtime.is_main:
        Path(leg["out"]).write_text(json.dumps(told | {"warned": warned}))
        torch.save(gradients, f"{leg['out']}.gradients")
    if run.tracker is not None:
        run.tracker.close()
    run.folder.close()
    runtime.barrier()


def write_refusals(config: Config, runtime: Runtime, out: str) -> None:
    told = "it was opened"
    try:
        open_run(config, runtime)
    except UserError as error:
        told = str(error)
    every = runtime.gather(told)
    if runtime.is_main:
        Path(out).write_text(json.dumps(every))
    runtime.barrier()


def predict_all(run: Run) -> dict[str, Any]:
    """Predictions [image, probabilities] and losses of several sets of rows, and what each rank forwarded: the samples,
    and of each batch the number of images and whether they were blank.
    """
    manifest, runtime = run.pipeline.manifest, run.pipeline.runtime
    rows = {"val": manifest.rows("val"), "test": manifest.rows("test")}
    rows |= {"nine": rows["test"][:9], "two": rows["test"][3:5], "one": rows["test"][7:8]}
    found: dict[str, Any] = {}
    for name, rows_N in rows.items():
        seen: list[tuple[int, str]] = []
        with mock.patch.object(predict_module, "evaluation_stream", watched_stream(seen)), forwards_of(run) as forwards:
            predictions, losses = predict_now(run, rows_N)
        found[name] = {
            "rows": rows_N.tolist(),
            "predictions": [[p.image_id, [*p.probability.values(), *p.scale_weight.values()]] for p in predictions],
            "losses": losses,
            "forwarded": runtime.gather(seen),
            "forwards": runtime.gather(forwards),
        }
    return found


@contextmanager
def forwards_of(run: Run) -> Iterator[list[tuple[int, bool]]]:
    """(images, whether they are blank) of each forward of the network in here."""
    labels = len(run.pipeline.labels)
    blank = run.pipeline.bag(blank_batch(run.pipeline.manifest, 1, labels=labels, features=None), epoch=None)
    forwards: list[tuple[int, bool]] = []

    def look(_module: torch.nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        tiles_BNCPP = named["tiles_BNCPP"]
        assert blank is not None
        forwards.append((len(tiles_BNCPP), torch.equal(tiles_BNCPP, blank.tiles_BNCPP.expand_as(tiles_BNCPP))))

    with run.network.register_forward_pre_hook(look, with_kwargs=True):
        yield forwards


def watched_stream(seen: list[tuple[int, str]]) -> Callable[..., Iterator[Batch]]:
    return lambda *arguments, **more: watched(evaluation_stream(*arguments, **more), seen, [])


def train_epoch_until(
    run: Run, until: int, validates: Sequence[int], told: dict[str, Any], gradients: dict[str, torch.Tensor]
) -> None:
    epoch, runtime = run.state.epoch, run.pipeline.runtime
    run.stepper = stepper_of_epoch(run, epoch)
    if not told["losses"]:
        keep_gradients(run.stepper.engine, gradients)
    batches = open_stream(run, epoch)
    for index in range(run.state.batches_done, run.schedule.steps_per_epoch):
        if run.state.step == until:
            return
        if run.state.step in validates:
            validate(run)
        seen: list[tuple[int, str]] = []
        sizes: list[int] = []
        report = run.stepper(
            watched(batches, seen, sizes), epoch=epoch, step=run.state.step, timer=PhaseTimer(runtime.synchronize)
        )
        run.state = after_step(run, epoch, index)
        told["losses"].append(report.losses["total"])
        told["norms"].append(report.gradient_norm)
        told["skipped"] += report.skipped
        told["samples"].append(seen)
        told["micro_batches"].append(sizes)
        if report.save:
            told["due"].append(run.state.step)
    run.state = replace(run.state, epoch=epoch + 1, batches_done=0)


def watched(batches: Iterator[Batch], seen: list[tuple[int, str]], sizes: list[int]) -> Iterator[Batch]:
    """The batches that a step receives; row and pixels of each sample are written down, and each batch's images."""
    for batch in batches:
        assert batch.image_B1HW is not None
        sizes.append(len(batch.image_B1HW))
        for row, image_1HW, weight in zip(batch.sample_B.tolist(), batch.image_B1HW, batch.weight_B, strict=True):
            if weight > 0:
                seen.append((row, hashlib.sha256(image_1HW.numpy().tobytes()).hexdigest()[:16]))
        yield batch


def keep_gradients(engine: Engine, gradients: dict[str, torch.Tensor]) -> None:
    """Look at the whole, averaged gradients in front of the first update."""
    from deepspeed.utils import safe_get_full_grad

    update = engine.update

    def look(*arguments: Any, **more: Any) -> tuple[float, bool]:
        if not gradients:
            for name, parameter in engine.module.named_parameters():
                plain = isinstance(engine, DdpEngine) or engine._stage == 0
                if parameter.requires_grad:
                    gradient = parameter.grad if plain else safe_get_full_grad(parameter)
                    assert gradient is not None, name
                    gradients[name] = gradient.clone()
        return update(*arguments, **more)

    engine.update = look  # type: ignore[method-assign]


class _Keeps(logging.Handler):
    """Keeps the warnings of a logger."""

    def __init__(self, warned: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.warned = warned

    def emit(self, record: logging.LogRecord) -> None:
        self.warned.append(record.getMessage())


def _with_threshold(config: dict[str, Any], threshold: int | None) -> dict[str, Any]:
    if threshold is not None:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 300
    return config
