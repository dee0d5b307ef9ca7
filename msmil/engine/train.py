"""Training, from top to bottom: open, resume, then epochs of steps, each epoch validated and saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NoReturn

import numpy as np

from msmil.config import Config
from msmil.config_io import dump_config
from msmil.engine.ahead import on_device
from msmil.engine.board import end_of_run, rank_scalars, show_validation
from msmil.engine.checkpoint import Snapshot, host_copy, prune, save_checkpoint
from msmil.engine.pipeline import Pipeline
from msmil.engine.preemption import Stopped
from msmil.engine.run import Run, bare_again, open_run, predict_now, shown_network
from msmil.engine.runtime import Runtime
from msmil.engine.step import Blocks, Stepper, StepReport
from msmil.engine.tracking import PhaseTimer, log, memory_bytes
from msmil.evaluation.classification import Threshold, rank, scores
from msmil.types import Prediction, TrainState
from shards.stream import train_stream
from shards.types import Batch

_NO_THRESHOLD: Final = Threshold(None, "ranking metrics need none")


def train(config: Config, runtime: Runtime) -> TrainState:
    """Train until the last epoch, going on from the newest checkpoint of the run folder if there is one.

    Raises:
        UserError: the configuration, the data or the folder do not allow it; a loss that is not finite.
        Stopped: a signal asked a rank to stop; all have stopped behind the same step, and the state is saved.
    """
    run = open_run(config, runtime)
    run.request.watch()
    if run.state.epoch >= config.train.epochs:
        log.info("already trained to the last epoch; more: another name, with more train.epochs")
    try:
        with run.saver:
            for epoch in range(run.state.epoch, config.train.epochs):
                run.stepper = stepper_of_epoch(run, epoch)
                train_epoch(run, epoch)
                due = (epoch + 1) % config.evaluate.every_epochs == 0 or epoch + 1 == config.train.epochs
                if due:
                    validate(run)
                save(run)
            finish_saving(run)
            if run.tracker is not None:
                run.tracker.add(end_of_run(), run.state.step)
            finish_saving(run)  # the last curves
    finally:
        if run.tracker is not None:
            run.tracker.close()
        run.folder.close()
        run.request.restore()  # last: a rank that has ended before must not make its launcher's SIGTERM end this one
    return run.state


def blocks_of_epoch(config: Config, epoch: int) -> Blocks:
    """How many of the backbone's blocks train in an epoch: none while the heads warm up or it is frozen."""
    if config.train.encoder == "frozen" or epoch < config.train.head_warmup_epochs:
        return 0
    return config.train.trainable_blocks


def stepper_of_epoch(run: Run, epoch: int) -> Stepper:
    """The stepper of an epoch: the one before, or a new one when another set of parameters trains."""
    blocks = blocks_of_epoch(run.pipeline.config, epoch)
    before = run.stepper
    if before is not None and before.blocks == blocks:
        return before
    if before is not None:
        run.moments, run.loss_scale = before.engine.moments(), before.engine.loss_scale
        run.network = bare_again(run, before.engine)
    sizes = [p.numel() for p in run.network.parameters()]  # ZeRO-3 leaves a rank none of it
    stepper = Stepper(
        run.pipeline,
        run.network,
        loss=run.loss,
        schedule=run.schedule,
        ema=run.ema,
        blocks=blocks,
        moments=run.moments,
        loss_scale=run.loss_scale,
        request=run.request,
        saver=run.saver,
    )
    trained = sum(size for p, size in zip(run.network.parameters(), sizes, strict=True) if p.requires_grad)
    log.info("epoch %d: %s of the backbone's blocks train, %.3f M parameters in all", epoch, blocks, trained / 1e6)
    run.moments = {}
    return stepper


def train_epoch(run: Run, epoch: int) -> None:
    """The steps of an epoch that are not done yet."""
    config = run.pipeline.config
    assert run.stepper is not None
    stream = open_stream(run, epoch)
    timer = PhaseTimer(run.pipeline.runtime.synchronize)
    start_s, losses = time.perf_counter(), []
    shown_s, shown_step = start_s, run.state.step
    for batch_index in range(run.state.batches_done, run.schedule.steps_per_epoch):
        step = run.state.step
        shown = (step + 1) % config.tracking.every_steps == 0
        timer.start(exact=shown)
        report = run.stepper(stream, epoch=epoch, step=step, timer=timer, unread=run.state.skipped)
        run.state = after_step(run, epoch, batch_index, unread=report.unread)
        losses.append(report.losses["total"])
        if run.tracker is not None:
            run.tracker.advance()
            if shown:
                elapsed_s, done = time.perf_counter() - shown_s, run.state.step - shown_step
                track_step(run, report, timer, done * config.train.batch_size / elapsed_s)
                shown_s, shown_step = time.perf_counter(), run.state.step
        if report.save_failed:
            finish_saving(run)
        if report.stop:
            stop(run)
        every, last = config.checkpoint.every_steps, batch_index + 1 == run.schedule.steps_per_epoch
        due = report.save or (every > 0 and run.state.step % every == 0)
        if due and not last:  # the end of an epoch is saved once it is validated
            save(run)
    tell_skipped(run, epoch)
    run.state = replace(run.state, epoch=epoch + 1, batches_done=0, skipped=0)
    if losses:
        speed = len(losses) * config.train.batch_size / (time.perf_counter() - start_s)
        mean = sum(losses) / len(losses)
        log.info("epoch %d of %d: loss %.4f, %.1f images/s", epoch + 1, config.train.epochs, mean, speed)


def tell_skipped(run: Run, epoch: int) -> None:
    """Say at the end of an epoch how many of its samples could not be read, where such are skipped."""
    if run.pipeline.config.data.on_error == "stop":
        return
    skipped, samples = run.state.skipped, run.schedule.samples_per_epoch
    log.info("epoch %d: %d of %d samples were skipped (data.on_error)", epoch + 1, skipped, samples)
    if run.tracker is not None:
        run.tracker.scalars({"train/skipped_samples": float(skipped)}, run.state.step)


def after_step(run: Run, epoch: int, batch_index: int, *, unread: int = 0) -> TrainState:
    """The state once a step is done; padding does not count as seen, nor do samples that could not be read."""
    return replace(
        run.state,
        step=run.state.step + 1,
        epoch=epoch,
        batches_done=batch_index + 1,
        samples_seen=run.state.samples_seen + int(run.schedule.samples_G[batch_index]) - unread,
        metric=None,
        skipped=run.state.skipped + unread,
    )


def open_stream(run: Run, epoch: int) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch, from where the state stands; on a GPU copied one ahead."""
    return micro_batches(run.pipeline, epoch, start_batch=run.state.batches_done)


def micro_batches(pipeline: Pipeline, epoch: int, *, start_batch: int) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch behind its first global batches; on a GPU copied one ahead."""
    config, runtime = pipeline.config, pipeline.runtime
    stream = iter(
        train_stream(
            pipeline.manifest,
            labels=pipeline.labels,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.train.batch_size,
            accumulation=config.train.accumulation,
            world=runtime.world,
            rank=runtime.rank,
            start_batch=start_batch,
            last_batch=config.data.last_batch,
            block_shards=config.data.shuffle_block_shards,
            sampling=config.data.sampling,
            group_by=config.data.group_by,
            workers=config.data.workers,
            prefetch_batches=config.data.prefetch_batches,
            pin_memory=runtime.device.type == "cuda",
            features=pipeline.features,
            on_error=config.data.on_error,
            node_ranks=runtime.node_ranks,
        )
    )
    return on_device(stream, runtime.device)


def track_step(run: Run, report: StepReport, timer: PhaseTimer, images_per_s: float) -> None:
    """Write the scalars of a step."""
    assert run.tracker is not None
    assert run.stepper is not None
    values = {f"train/loss/{name}": value for name, value in report.losses.items()}
    values |= {f"train/lr/{name}": rate for name, rate in run.stepper.learning_rates().items()}
    values |= {f"train/seconds/{phase}": seconds for phase, seconds in timer.seconds.items()}
    values["train/seconds/step"] = timer.total_s
    values |= rank_scalars(report.own_s)
    values["train/gradient_norm"] = report.gradient_norm
    if run.pipeline.config.train.precision == "fp16":
        values["train/skipped"] = float(report.skipped)
    values["train/images_per_s"] = images_per_s
    values["train/memory_gb"] = memory_bytes(run.pipeline.runtime.device) / 1e9
    run.tracker.scalars(values, run.state.step)


def validate(run: Run) -> None:
    """Predict the validation images, track metrics and losses, and remember whether this step is the best so far.

    The metric is the mean of the labels' AUROC; a label without positives or negatives has none and is left out.
    """
    predictions, losses = predict_now(run, run.pipeline.manifest.rows("val"))
    values = validation_scalars(predictions, run.pipeline.labels, run.network.scales)
    values |= {f"val/loss/{name}": value for name, value in losses.items() if math.isfinite(value)}
    aurocs = [values[key] for label in run.pipeline.labels if (key := f"val/auroc/{label}") in values]
    metric = sum(aurocs) / len(aurocs) if aurocs else None
    if metric is not None:
        values["val/auroc/mean"] = metric
    best = run.state.best_metric
    run.state = replace(run.state, metric=metric)
    if metric is not None and (best is None or metric > best):
        run.state = replace(run.state, best_metric=metric, best_step=run.state.step)
    best_now = run.state.best_step == run.state.step
    network = shown_network(run)
    run.pipeline.runtime.on_main(lambda: show_validation(run, network, predictions, values, best=best_now))
    text = ", ".join(f"{label} {values.get(f'val/auroc/{label}', float('nan')):.3f}" for label in run.pipeline.labels)
    log.info("validation AUROC: %s%s", text, " (best so far)" if best_now else "")


def validation_scalars(
    predictions: list[Prediction], labels: tuple[str, ...], scales: tuple[int, ...]
) -> dict[str, float]:
    """AUROC and average precision per label, aggregated and per scale; what is undefined is absent."""
    values: dict[str, float] = {}
    for label in labels:
        target = np.array([p.target[label] for p in predictions])
        columns = {label: [p.probability[label] for p in predictions]}
        for scale in scales if predictions and predictions[0].scale_probability else ():
            columns[f"{label}/scale_{scale}"] = [p.scale_probability[scale, label] for p in predictions]
        for name, probability in columns.items():
            found = scores(rank(target, np.asarray(probability)), _NO_THRESHOLD).value
            for metric in ("auroc", "average_precision"):
                if (value := found[metric]) is not None:
                    values[f"val/{metric}/{name}"] = value
    return values


def stop(run: Run) -> NoReturn:
    """Save, and end as all ranks have agreed to."""
    save(run)
    finish_saving(run)
    stopped = Stopped(max(run.pipeline.runtime.gather(run.request.signum)), run.state.step)
    log.info("a signal asks to stop: all is saved")
    raise stopped


def save(run: Run) -> None:
    """Begin to write a checkpoint on rank 0, once the one before is written; all ranks have to call it.

    Raises:
        UserError: the one before, or a curve, could not be written; on all ranks.
    """
    assert run.stepper is not None
    start_s = time.perf_counter()
    finish_saving(run)
    engine, settings, root = run.stepper.engine, run.pipeline.config.checkpoint, run.folder.checkpoints
    weights, moments = engine.weights(), engine.moments()  # all ranks put the parts together
    if not run.pipeline.runtime.is_main:
        return
    snapshot = Snapshot(
        model=host_copy(weights),
        optimizer=host_copy(moments),
        ema=None if run.ema is None else host_copy(run.ema.state_dict()),
        state=run.state,
        loss_scale=engine.loss_scale,
        config_yaml=dump_config(run.pipeline.config),
    )

    def write() -> None:
        save_checkpoint(root, snapshot)
        prune(root, keep_last=settings.keep_last, keep_best=settings.keep_best)

    run.saver.begin(write)
    if run.tracker is not None:
        run.tracker.scalars({"train/seconds/save": time.perf_counter() - start_s}, run.state.step)


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint that was begun; all ranks stop with the word of what could not be written."""
    run.pipeline.runtime.on_main(run.saver.wait)
