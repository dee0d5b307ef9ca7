"""One optimizer step: micro-steps of forward and backward, clipping, update, moving statistics, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from msmil.engine.engines import make_engine
from msmil.engine.losses import BagLoss, LossParts
from msmil.engine.memory import OutOfMemory, explained, training_out_of_memory
from msmil.engine.optim import build_optimizer, learning_rate_factor, set_learning_rate
from msmil.engine.pipeline import Pipeline, to_device
from msmil.engine.preemption import StopRequest
from msmil.engine.seeding import seed_micro_step
from msmil.engine.tracking import PhaseTimer
from msmil.models.backbone import set_trainable
from msmil.models.mil import MILModel
from shards.errors import UserError
from shards.stream import blank_batch
from shards.types import Batch

Blocks = Literal["all"] | int


@dataclass(frozen=True)
class StepReport:
    """What one step did, the same on all ranks.

    stop: a rank was asked to stop.
    own_s: seconds of each rank until its last backward, in which the ranks wait for each other; empty in steps that
    are not timed exactly.
    """

    losses: dict[str, float]
    gradient_norm: float
    skipped: bool
    stop: bool
    own_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Lengths of a run in optimizer steps."""

    steps_per_epoch: int
    samples_per_epoch: int
    total_steps: int
    warmup_steps: int
    uniform_steps: float

    def uniform_mix(self, step: int) -> float:
        """Share of uniform attention at a step: 1 -> 0 over the first uniform_steps."""
        return max(0.0, 1.0 - step / self.uniform_steps) if self.uniform_steps > 0 else 0.0


class Stepper:
    """Trains one set of parameters; when another set trains, a new Stepper takes over through its engine's state."""

    def __init__(
        self,
        pipeline: Pipeline,
        module: MILModel,
        *,
        loss: BagLoss,
        schedule: Schedule,
        ema: AveragedModel | None,
        blocks: Blocks,
        moments: dict[str, Tensor],
        loss_scale: Mapping[str, Any] | None,
        request: StopRequest,
    ) -> None:
        self.request = request
        self.pipeline, self.module, self.loss, self.schedule, self.ema = pipeline, module, loss, schedule, ema
        self.blocks, self._runtime = blocks, pipeline.runtime
        set_trainable(module, blocks)
        self._optimizer = build_optimizer(module, pipeline.config.optim)
        self.engine = make_engine(pipeline, module, self._optimizer, moments=moments, loss_scale=loss_scale)
        self._moved = _moving_statistics(module) if pipeline.config.train.batch_norm == "train" and blocks else []
        self.engine.settle(lambda: self._forward(self._blank_batch(), epoch=0, step=0, micro=0).total)

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group in the step that was done last."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def __call__(self, batches: Iterator[Batch], *, epoch: int, step: int, timer: PhaseTimer) -> StepReport:
        """Do optimizer step number `step` (0-based) on the next `accumulation` micro-batches.

        Raises:
            UserError: the loss or the gradient is not finite; no parameter was changed.
            OutOfMemory: the micro-batch is too large for the device.
        """
        with explained(self._out_of_memory):
            return self._step(batches, epoch=epoch, step=step, timer=timer)

    def _step(self, batches: Iterator[Batch], *, epoch: int, step: int, timer: PhaseTimer) -> StepReport:
        config = self.pipeline.config
        factor = learning_rate_factor(
            step, total_steps=self.schedule.total_steps, warmup_steps=self.schedule.warmup_steps
        )
        set_learning_rate(self._optimizer, factor)
        self.module.train()
        rows: list[int] = []
        shares: list[Tensor] = []
        for micro in range(config.train.accumulation):
            batch = next(batches)
            timer.mark("wait")
            rows += batch.sample_B.tolist()
            with self.engine.micro_step(last=micro == config.train.accumulation - 1):
                with self._runtime.waiting() if self.engine.divides_weights else nullcontext():
                    parts = self._forward(batch, epoch=epoch, step=step, micro=micro)
                timer.mark("forward")
                own_s = timer.total_s
                with self._runtime.waiting():
                    self.engine.backward(parts.total)
                timer.mark("backward")
            shares.append(torch.stack([*parts.named(self.pipeline.labels).values()]))
        losses, stop, seconds = self._reduce(parts, torch.stack(shares).sum(0), own_s if timer.exact else None)
        timer.mark("communication")
        self._refuse_non_finite("loss", losses["total"], rows)
        overflows = config.train.precision == "fp16"
        with self._runtime.waiting():
            norm, skipped = self.engine.update(config.optim.clip_grad_norm, may_overflow=overflows)
        if not overflows:
            self._refuse_non_finite("gradient", norm, rows)
        self._after_update(skipped)
        timer.mark("optimizer")
        return StepReport(losses=losses, gradient_norm=norm, skipped=skipped, stop=stop, own_s=seconds)

    def _forward(self, batch: Batch, *, epoch: int, step: int, micro: int) -> LossParts:
        config, device = self.pipeline.config, self.pipeline.runtime.device
        model_input = self.pipeline.model_input(batch, self.pipeline.bag(batch, epoch=epoch))
        seed_micro_step(config.seed, step, micro, self.pipeline.runtime.rank)
        output = self.engine(
            **model_input,
            uniform_mix=self.schedule.uniform_mix(step),
            **self.loss.asks,
        )
        parts: LossParts = self.loss(
            output,
            to_device(batch.label_BK, device),
            to_device(batch.weight_B, device),
            global_count=config.train.batch_size * len(self.pipeline.labels),
        )
        return parts

    def _reduce(
        self, parts: LossParts, share: Tensor, own_s: float | None
    ) -> tuple[dict[str, float], bool, tuple[float, ...]]:
        """The loss, whether to stop, and the seconds of every rank, in one all-reduce.

        In the seconds a rank fills its place among zeros.
        """
        runtime, names = self.pipeline.runtime, list(parts.named(self.pipeline.labels))
        share = torch.cat([share, share.new_tensor([float(self.request.signum > 0)])])
        if own_s is not None:
            place_W = share.new_zeros(runtime.world)
            place_W[runtime.rank] = own_s
            share = torch.cat([share, place_W])
        with runtime.waiting():
            values = runtime.sum(share).tolist()  # on a GPU it is here that all of the step is waited for
        losses = dict(zip(names, values[: len(names)], strict=True))
        return losses, values[len(names)] > 0, tuple(values[len(names) + 1 :])

    def _refuse_non_finite(self, what: str, value: float, rows: list[int]) -> None:
        """All ranks have the same value. fp16 scales gradients and skips the steps in which they overflow."""
        if math.isfinite(value):
            return
        every = sorted({row for part in self.pipeline.runtime.gather(rows) for row in part})
        images = ", ".join(self.pipeline.manifest.record(row).key for row in every)
        fix = "look at these images, lower optim.lr, set optim.clip_grad_norm, or train in fp32"
        raise UserError(f"the {what} is not finite; the batch held the samples {images}", fix=fix)

    def _after_update(self, skipped: bool) -> None:
        if self._moved:
            self.pipeline.runtime.average(self._moved)
        if self.ema is not None and not skipped:
            self.ema.update_parameters(self.module)

    @property
    def _micro_batch(self) -> int:
        config = self.pipeline.config.train
        return config.batch_size // (self.pipeline.runtime.world * config.accumulation)

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        config, runtime, images = self.pipeline.config, self.pipeline.runtime, self._micro_batch
        return training_out_of_memory(
            error, config, self.module, images=images, world=runtime.world, device=runtime.device
        )

    def _blank_batch(self) -> Batch:
        """A micro-batch of black images that weigh nothing."""
        pipeline, size = self.pipeline, self._micro_batch
        return blank_batch(pipeline.manifest, size, labels=len(pipeline.labels), features=pipeline.features)


def _moving_statistics(module: nn.Module) -> list[Tensor]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
