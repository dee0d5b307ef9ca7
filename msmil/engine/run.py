"""Opening a run: the folder, the data, the network, the loss, and the newest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from msmil.config import Config
from msmil.config_checks import has_fused_head
from msmil.config_io import dump_config
from msmil.engine.board import has_maps, shows_images, start_of_run
from msmil.engine.checkpoint import Checkpoint, load_checkpoint, load_newest
from msmil.engine.compiled import use_own_cache
from msmil.engine.data import check_trained_on, describe_epoch, first_epoch
from msmil.engine.data_summary import describe_data
from msmil.engine.ddp import DdpEngine
from msmil.engine.engines import Engine
from msmil.engine.losses import BagLoss, auto_pos_weight
from msmil.engine.optim import build_ema
from msmil.engine.pipeline import Pipeline, build_network, known_labels, open_pipeline, with_encoder_of
from msmil.engine.predict import predict_with_losses
from msmil.engine.preemption import StopRequest
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime, emulated_precision
from msmil.engine.saving import Saver
from msmil.engine.seeding import seed_everything
from msmil.engine.step import Schedule, Stepper
from msmil.engine.tracking import Tracker, log, open_log
from msmil.models.backbone import freeze_statistics, set_gradient_checkpointing
from msmil.models.mil import MILModel
from msmil.models.weights import load_weights
from msmil.types import Prediction, TrainState
from shards.balance import draw_share, label_classes
from shards.errors import UserError


@dataclass
class Run:
    """The moving parts of a run in this process."""

    pipeline: Pipeline
    folder: RunFolder
    network: MILModel
    ema: AveragedModel | None
    loss: BagLoss
    schedule: Schedule
    state: TrainState
    moments: dict[str, Tensor]
    loss_scale: dict[str, Any] | None
    tracker: Tracker | None
    saver: Saver
    stepper: Stepper | None = None
    request: StopRequest = field(default_factory=StopRequest)


def open_run(config: Config, runtime: Runtime) -> Run:
    """Build everything, and load the newest checkpoint."""
    folder = RunFolder(f"{config.output_dir}/{config.name}")
    folder.check(config)
    pipeline = open_pipeline(config, runtime)
    runtime.barrier()  # nobody writes before all have checked

    def make_folder() -> None:
        folder.open(world=runtime.world, device=runtime.device_name)
        folder.describe(describe_data(pipeline.manifest, pipeline.labels))

    runtime.on_main(make_folder)
    runtime.tell_hangs_to(folder.log)
    open_log(folder.log if runtime.is_main else None, quiet=runtime.quiet)
    if pipeline.manifest.remote is not None:
        log.info("images: %s", pipeline.manifest.remote)
    emulated = emulated_precision(config.train, runtime.device)
    if emulated is not None and runtime.is_main:
        log.info(emulated)
    if config.train.compile and use_own_cache(folder.root, runtime) and runtime.is_main:
        log.info("what torch.compile had kept for this run is thrown away: a process was killed that used it")
    schedule = make_schedule(pipeline)
    checkpoint = newest_checkpoint(folder, runtime)
    goes_on = checkpoint is None or checkpoint.state.epoch < config.train.epochs
    if goes_on:  # else the folder would state options that nothing was trained with
        runtime.on_main(lambda: folder.write_config(config))
    network = make_network(pipeline, pretrained=checkpoint is None)
    ema = build_ema(network, config.train.ema_decay)
    saver = Saver(every_minutes=config.checkpoint.every_minutes)
    run = Run(
        pipeline, folder, network, ema, make_loss(pipeline), schedule, fresh_state(pipeline), {}, None, None, saver
    )
    if checkpoint is not None:
        resume(run, checkpoint)
    run.pipeline = with_encoder_of(pipeline, network)
    runtime.on_main(lambda: _open_tracker(run, goes_on))
    return run


def _open_tracker(run: Run, goes_on: bool) -> None:
    config, runtime = run.pipeline.config, run.pipeline.runtime
    steps = {"start_step": run.state.step, "total_steps": run.schedule.total_steps}
    run.tracker = Tracker(run.folder.tensorboard, **steps, failed=run.saver.fail)
    if goes_on:
        run.tracker.text("configuration", dump_config(config))
        run.tracker.add(start_of_run(run), 0)
    if config.tracking.images and not has_maps(run.network):
        log.info("this model has no maps: TensorBoard shows no images (tracking.images)")
    run.tracker.open_progress(quiet=runtime.quiet)


def make_network(pipeline: Pipeline, *, pretrained: bool) -> MILModel:
    """The network as it trains: on the device, with the memory format and the statistics of the configuration.

    `pretrained` says whether model.pretrained and model.weights are obeyed: not when a checkpoint is loaded next.
    """
    config, runtime = pipeline.config, pipeline.runtime
    seed_everything(config.seed)
    network = build_network(config, pipeline.image_hw, pretrained=pretrained)
    if pretrained and config.model.weights:
        log.info(load_weights(config.model, network).text())
    if config.train.batch_norm == "frozen":
        freeze_statistics(network)
    if config.train.batch_norm == "sync":
        # timm's, since torch's own drops the activation that timm's norms hold
        network.backbone = convert_sync_batchnorm(network.backbone)
    if config.train.gradient_checkpointing:
        set_gradient_checkpointing(network)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    network.to(device=runtime.device, memory_format=memory_format)  # type: ignore[call-overload]
    if network.pyramid is not None and runtime.device.type == "cpu":
        network.pyramid.refine.to(memory_format=torch.contiguous_format)  # as its input, see there
    return network


def bare_again(run: Run, engine: Engine) -> MILModel:
    """The network once its engine is closed. DeepSpeed's buffers go with it: there a new network takes the weights."""
    if isinstance(engine, DdpEngine):
        engine.close()
        return run.network
    weights = engine.weights()
    engine.close()
    return _network_of(run, weights)


def _network_of(run: Run, weights: dict[str, Tensor]) -> MILModel:
    network = make_network(run.pipeline, pretrained=False)
    network.load_state_dict(weights)
    return network


def predict_now(run: Run, rows_N: np.ndarray) -> tuple[list[Prediction], dict[str, float]]:
    """Predictions and losses of these rows with the weights of now. All ranks have to call it.

    Weights that are divided among the ranks (ZeRO-3) stay divided: the engine forwards.
    """
    assert run.stepper is not None
    engine = run.stepper.engine
    together = engine if engine.divides_weights else None
    return predict_with_losses(run.pipeline, _validated(run), run.network.scales, rows_N, run.loss, together=together)


def shown_network(run: Run) -> MILModel:
    """The network that rank 0 shows once it is validated. All ranks have to call it.

    Rank 0 draws pictures alone: where it does and weights are divided (ZeRO-3), it gets a whole copy.
    """
    assert run.stepper is not None
    network, engine = _validated(run), run.stepper.engine
    if not (engine.divides_weights and shows_images(run.pipeline.config, network)):
        return network
    weights = engine.weights()
    return _network_of(run, weights) if run.pipeline.runtime.is_main else network


def _validated(run: Run) -> MILModel:
    """The averaged weights where there are any."""
    return run.network if run.ema is None else cast(MILModel, run.ema.module)


def make_schedule(pipeline: Pipeline) -> Schedule:
    """Lengths of the run in steps."""
    config = pipeline.config
    plan = first_epoch(config, pipeline.manifest)
    log.info("%s", describe_epoch(plan, pipeline.labels))
    steps = plan.num_batches
    total = steps * config.train.epochs
    return Schedule(
        steps_per_epoch=steps,
        samples_G=plan.filled_G,
        total_steps=total,
        warmup_steps=round(steps * config.optim.warmup_epochs),
        uniform_steps=total * config.loss.uniform_attention_share,
    )


def make_loss(pipeline: Pipeline) -> BagLoss:
    """The loss with its pos_weight, from the training images as often as they are drawn where it is auto."""
    config, labels = pipeline.config, pipeline.labels
    chosen = config.loss.pos_weight
    if chosen == "auto":
        label_NK = known_labels(pipeline.manifest, pipeline.manifest.rows("train"), labels)
        balanced = config.data.sampling == "class_balanced"
        share_N = draw_share(label_classes(label_NK, labels)) if balanced else None
        weight_K, warnings = auto_pos_weight(label_NK, labels, share_N)
        for warning in warnings if pipeline.runtime.is_main else ():
            log.warning(warning)
    else:
        weight_K = np.ones(len(labels)) if chosen == "none" else np.asarray(chosen)
    text = ", ".join(f"{label} {weight:.4g}" for label, weight in zip(labels, weight_K, strict=True))
    log.info("pos_weight: %s", text)
    loss = BagLoss(config.loss, weight_K, fused_head=has_fused_head(config.model))
    return loss.to(pipeline.runtime.device)


def fresh_state(pipeline: Pipeline) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=0,
        epoch=0,
        batches_done=0,
        samples_seen=0,
        best_metric=None,
        best_step=None,
        data_fingerprint=pipeline.manifest.fingerprint,
    )


def newest_checkpoint(folder: RunFolder, runtime: Runtime) -> Checkpoint | None:
    """The newest whole checkpoint, if there is one; rank 0 chooses, so that all ranks go on from the same."""
    found: list[Checkpoint | None] = [None]

    def choose() -> None:
        found[0] = load_newest(folder.checkpoints, log.warning)

    runtime.on_main(choose)
    name = runtime.gather(None if found[0] is None else found[0].folder.name)[0]
    return found[0] if runtime.is_main or name is None else load_checkpoint(folder.checkpoints / name)


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Go on from a checkpoint."""
    folder = checkpoint.folder
    check_trained_on(folder, checkpoint.state, run.pipeline.manifest)
    run.network.load_state_dict(checkpoint.model)
    if run.ema is not None:
        if checkpoint.ema is None:
            raise UserError("holds no averaged weights", file=folder, fix="set train.ema_decay: 0")
        run.ema.load_state_dict(checkpoint.ema)
    run.moments, run.loss_scale, run.state = checkpoint.optimizer, checkpoint.loss_scale, checkpoint.state
    log.info("resuming from %s (epoch %d, step %d)", folder, run.state.epoch, run.state.step)
