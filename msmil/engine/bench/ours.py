"""The step that training does, with its engine and its log of phases, without a run folder around it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from msmil.engine.bench.clock import Seconds, seconds
from msmil.engine.optim import build_ema
from msmil.engine.pipeline import Pipeline
from msmil.engine.preemption import StopRequest
from msmil.engine.run import make_loss, make_network, make_schedule
from msmil.engine.saving import Saver
from msmil.engine.step import Stepper
from msmil.engine.tracking import PHASES, PhaseTimer
from msmil.engine.train import blocks_of_epoch, micro_batches
from shards.stream import evaluation_stream
from shards.types import Batch


class OurStep:
    """The Stepper of a configuration; `blocks` of the backbone's blocks train, as in the last epoch."""

    def __init__(self, pipeline: Pipeline, calibrate_on: Batch) -> None:
        config, self._pipeline = pipeline.config, pipeline
        self.blocks = blocks_of_epoch(config, config.train.epochs - 1)
        self.network = make_network(pipeline, pretrained=False)
        calibrate(pipeline, self.network, calibrate_on)
        self._stepper = Stepper(
            pipeline,
            self.network,
            loss=make_loss(pipeline),
            schedule=make_schedule(pipeline),
            ema=build_ema(self.network, config.train.ema_decay),
            blocks=self.blocks,
            moments={},
            loss_scale=None,
            request=StopRequest(),
            saver=Saver(every_minutes=0),
        )
        self._timer = PhaseTimer(pipeline.runtime.synchronize)
        self._steps = itertools.count()

    def __call__(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on these micro-batches, from the host's memory."""
        self._do(iter(batches), exact=False)

    def phases(self, stream: Iterator[Batch], steps: int) -> dict[str, float]:
        """Median seconds of each phase of a step, the device waited for after each, and of the whole step."""
        found: dict[str, list[float]] = {name: [] for name in (*PHASES, "step")}
        for _ in range(steps):
            self._do(stream, exact=True)
            for name, value in (*self._timer.seconds.items(), ("step", self._timer.total_s)):
                found[name].append(value)
        return {name: median(values) for name, values in found.items()}

    def loop(self, stream: Iterator[Batch], steps: int) -> Seconds:
        """Seconds per image of the loop as it trains: nothing is waited for that need not be."""

        def loop() -> None:
            for _ in range(steps):
                self._do(stream, exact=False)

        took, images = seconds(loop, self._pipeline.runtime.device), steps * self._pipeline.config.train.batch_size
        return Seconds(took.wall / images, took.work / images)

    def _do(self, batches: Iterator[Batch], *, exact: bool) -> None:
        self._timer.start(exact=exact)
        self._stepper(batches, epoch=0, step=next(self._steps), timer=self._timer)


def endless(pipeline: Pipeline) -> Iterator[Batch]:
    """Micro-batches of one epoch after the other, as training reads them."""
    for epoch in itertools.count():
        yield from micro_batches(pipeline, epoch, start_batch=0)


def host_batch(pipeline: Pipeline, images: int, *, different: int | None = None) -> Batch:
    """So many training images in the host's memory; the first `different` again and again, or all that there are."""
    rows = pipeline.manifest.rows("train")[: images if different is None else min(images, different)]
    (batch,) = evaluation_stream(
        pipeline.manifest,
        labels=pipeline.labels,
        rows=rows,
        batch_size=len(rows),
        workers=0,
        prefetch_batches=1,
        pin_memory=False,
    )
    place_B = np.arange(images) % len(rows)

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(tensor.numpy()[place_B])  # numpy's indexing knows uint16

    assert batch.image_B1HW is not None
    batch = replace(
        batch,
        image_B1HW=repeated(batch.image_B1HW),
        label_BK=repeated(batch.label_BK),
        weight_B=repeated(batch.weight_B),
        sample_B=repeated(batch.sample_B),
    )
    return batch.pin_memory() if pipeline.runtime.device.type == "cuda" else batch


@torch.no_grad()
def calibrate(pipeline: Pipeline, network: nn.Module, batch: Batch) -> None:
    """Give norms the statistics of a batch.

    With those of a fresh network numbers vanish or overflow on their way through it, and arithmetic with numbers that
    are nearly 0 is slower on a CPU.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    model_input: dict[str, Any] = pipeline.model_input(batch, pipeline.bag(batch, epoch=None))
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    network(**model_input)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train()
