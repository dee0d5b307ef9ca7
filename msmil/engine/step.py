"""One optimizer step: micro-steps of forward and backward, clipping, update, moving statistics, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from msmil.engine.broken import refuse_non_finite, settle_skipped
from msmil.engine.engines import make_engine
from msmil.engine.losses import BagLoss, LossParts
from msmil.engine.memory import OutOfMemory, explained, training_out_of_memory
from msmil.engine.optim import build_optimizer, learning_rate_factor, set_learning_rate
from msmil.engine.pipeline import Pipeline, to_device
from msmil.engine.preemption import StopRequest
from msmil.engine.saving import Saver
from msmil.engine.seeding import seed_micro_step
from msmil.engine.tracking import PhaseTimer
from msmil.models.backbone import set_trainable
from msmil.models.mil import MILModel
from shards.stream import blank_batch
from shards.types import Batch

Blocks = Literal["all"] | int


@dataclass(frozen=True)
class StepReport:
    """What one step did, the same on all ranks.

    unread: samples that could not be read and were skipped; stop: a rank was asked to stop; save: a checkpoint is due
    by the clock; save_failed: the last one, or a curve, could not be written.
    own_s: seconds of each rank until its last backward, in which the ranks wait for each other; empty in steps that
    are not timed exactly.
    """

    losses: dict[str, float]
    gradient_norm: float
    skipped: bool
    unread: int
    stop: bool
    save: bool
    save_failed: bool
    own_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Lengths of a run in optimizer steps, and how many images each step of an epoch holds (its padding left out)."""

    steps_per_epoch: int
    samples_G: NDArray[np.int32]
    total_steps: int
    warmup_steps: int
    uniform_steps: float

    @property
    def samples_per_epoch(self) -> int:
        """Samples that count in an epoch."""
        return int(self.samples_G.sum())

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
        saver: Saver,
    ) -> None:
        self.request, self.saver = request, saver
        self.pipeline, self.module, self.loss, self.schedule, self.ema = pipeline, module, loss, schedule, ema
        self.blocks, self._runtime = blocks, pipeline.runtime
        set_trainable(module, blocks)
        self._optimizer = build_optimizer(module, pipeline.config.optim)
        with explained(self._out_of_memory):
            self.engine = make_engine(pipeline, module, self._optimizer, moments=moments, loss_scale=loss_scale)
        self._forward_waits = self.engine.divides_weights or pipeline.config.train.batch_norm == "sync"
        self._moved = _moving_statistics(module) if pipeline.config.train.batch_norm == "train" and blocks else []
        with explained(self._out_of_memory):  # DDP's first forward and backward of a micro-batch
            self.engine.settle(lambda: self._forward(self._blank_batch(), epoch=0, step=0, micro=0).total)

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group in the step that was done last."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def __call__(
        self, batches: Iterator[Batch], *, epoch: int, step: int, timer: PhaseTimer, unread: int = 0
    ) -> StepReport:
        """Do optimizer step number `step` (0-based) on the next `accumulation` micro-batches.

        `unread` samples were skipped in this epoch before, since they could not be read.

        Raises:
            UserError: the loss or the gradient is not finite, or too many samples cannot be read; no parameter was
                changed.
            OutOfMemory: the micro-batch is too large for the device.
        """
        with explained(self._out_of_memory):
            return self._step(batches, epoch=epoch, step=step, timer=timer, unread=unread)

    def _step(self, batches: Iterator[Batch], *, epoch: int, step: int, timer: PhaseTimer, unread: int) -> StepReport:
        config = self.pipeline.config
        factor = learning_rate_factor(
            step, total_steps=self.schedule.total_steps, warmup_steps=self.schedule.warmup_steps
        )
        set_learning_rate(self._optimizer, factor)
        self.module.train()
        rows: list[list[int]] = []
        broken: list[str] = []
        shares: list[Tensor] = []
        for micro in range(config.train.accumulation):
            batch = next(batches)
            timer.mark("wait")
            rows.append(batch.sample_B.tolist())
            broken += batch.skipped.values()
            with self.engine.micro_step(last=micro == config.train.accumulation - 1):
                parts = self._forward(batch, epoch=epoch, step=step, micro=micro)
                timer.mark("forward")
                own_s = timer.total_s
                with self._runtime.waiting():
                    self.engine.backward(parts.total)
                timer.mark("backward")
            shares.append(torch.stack([*parts.named(self.pipeline.labels).values()]))
        share_MP = torch.stack(shares)  # M micro-steps, P parts of the loss, the total first
        losses, newly_unread, flags, seconds = self._reduce(
            parts, share_MP.sum(0), len(broken), own_s if timer.exact else None
        )
        timer.mark("communication")
        settle_skipped(
            self.pipeline,
            broken,
            skipped=newly_unread,
            before=unread,
            samples_per_epoch=self.schedule.samples_per_epoch,
        )
        if not math.isfinite(losses["total"]):
            refuse_non_finite(self.pipeline, "loss", rows, share_MP[:, 0])
        overflows = config.train.precision == "fp16"
        with self._runtime.waiting():
            norm, skipped = self.engine.update(config.optim.clip_grad_norm, may_overflow=overflows)
        if not overflows and not math.isfinite(norm):  # fp16 scales gradients and skips the steps that overflow
            refuse_non_finite(self.pipeline, "gradient", rows)
        self._after_update(skipped)
        timer.mark("optimizer")
        stop, save, save_failed = flags
        return StepReport(
            losses=losses,
            gradient_norm=norm,
            skipped=skipped,
            unread=newly_unread,
            stop=stop,
            save=save,
            save_failed=save_failed,
            own_s=seconds,
        )

    def _forward(self, batch: Batch, *, epoch: int, step: int, micro: int) -> LossParts:
        config, device = self.pipeline.config, self.pipeline.runtime.device
        model_input = self.pipeline.model_input(batch, self.pipeline.bag(batch, epoch=epoch))
        seed_micro_step(config.seed, step, micro, self.pipeline.runtime.rank)
        mix = self.schedule.uniform_mix(step)
        with self._runtime.waiting() if self._forward_waits else nullcontext():
            output = self.engine(**model_input, uniform_mix=mix, **self.loss.asks)
        parts: LossParts = self.loss(
            output,
            to_device(batch.label_BK, device),
            to_device(batch.weight_B, device),
            global_count=config.train.batch_size * len(self.pipeline.labels),
        )
        return parts

    def _reduce(
        self, parts: LossParts, share: Tensor, unread: int, own_s: float | None
    ) -> tuple[dict[str, float], int, list[bool], tuple[float, ...]]:
        """The loss, how many samples are skipped, what some rank tells (stop, save, a write failed) and the seconds
        of each, in one all-reduce.

        In the seconds a rank fills its place among zeros. Only rank 0 saves, and its clock alone counts.
        """
        runtime, names = self.pipeline.runtime, list(parts.named(self.pipeline.labels))
        told = [self.request.signum > 0, runtime.is_main and self.saver.due, self.saver.failed]
        share = torch.cat([share, share.new_tensor([float(one) for one in (unread, *told)])])
        if own_s is not None:
            place_W = share.new_zeros(runtime.world)
            place_W[runtime.rank] = own_s
            share = torch.cat([share, place_W])
        with runtime.waiting():
            values = runtime.sum(share).tolist()  # on a GPU it is here that all of the step is waited for
        losses = dict(zip(names, values[: len(names)], strict=True))
        skipped, *rest = values[len(names) :]
        return losses, round(skipped), [count > 0 for count in rest[: len(told)]], tuple(rest[len(told) :])

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
