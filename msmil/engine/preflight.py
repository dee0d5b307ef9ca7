"""Everything that can be checked before anything starts; the same checks in the parent and in every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from msmil.config import Config
from msmil.engine.checkpoint_state import newest, read_state
from msmil.engine.data import check_trained_on, first_epoch, open_data
from msmil.engine.environment import refuse_environment, require_engine
from msmil.engine.features import choose_levels, open_features
from msmil.engine.pipeline import build_network
from msmil.engine.run_folder import RunFolder, nearest_folder
from msmil.engine.runtime import gpu_in_use, refuse_on_cpu
from msmil.models.backbone import set_gradient_checkpointing, set_trainable
from msmil.models.weights import check_weights
from shards.errors import UserError
from shards.files import free_bytes
from shards.manifest import Manifest
from shards.plan import EpochPlan, rank_slice
from shards.remote.coming import check_whole_shards

_COPIES = 3  # weights and Adam's two moments


def check_experiment(config: Config, world: int) -> Manifest:
    """Check a configuration against this machine, its data and its run folder, for `world` ranks.

    Raises:
        UserError: what is wrong, before a process starts or a file is written.
    """
    refuse_environment(config.train, clip_grad_norm=config.optim.clip_grad_norm)
    require_engine(config.train)
    if not gpu_in_use():
        refuse_on_cpu(config.train)
    manifest = open_data(config)
    rank_slice(config.train.batch_size, world, 0, config.train.accumulation)
    plan = check_splits(config, manifest)
    with torch.device("meta"):
        network = build_network(config, (manifest.height_px, manifest.width_px), pretrained=False)
    if (features := open_features(config, manifest)) is not None:
        choose_levels(features, network)
    check_whole_shards(plan, manifest, features)
    set_trainable(network, config.train.trainable_blocks)
    if config.train.gradient_checkpointing:
        set_gradient_checkpointing(network)
    folder = RunFolder(Path(config.output_dir) / config.name)
    folder.check(config)
    trained = newest(folder.checkpoints)
    if trained is not None:
        check_trained_on(trained, read_state(trained)[0], manifest)
    elif config.model.weights:
        check_weights(config.model, network)
    _check_space(config, folder, sum(p.numel() * p.element_size() for p in network.parameters()))
    return manifest


def fetch_pretrained(config: Config, manifest: Manifest) -> None:
    """Have timm's weights in the hub's cache of this machine before ranks start, where a run begins with them.

    Raises:
        UserError: they cannot be loaded.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    if config.model.pretrained and newest(folder.checkpoints) is None:
        build_network(config, (manifest.height_px, manifest.width_px), pretrained=True)


def check_splits(config: Config, manifest: Manifest) -> EpochPlan:
    """The order of the first epoch. Refuses data without a whole global batch to train on or validation images."""
    plan = first_epoch(config, manifest)
    if len(manifest.rows("val")) == 0:
        fix = "pack again with --validation-fraction or --validation-fold"
        raise UserError("there are no validation images", file=manifest.place, fix=fix)
    return plan


def _check_space(config: Config, folder: RunFolder, parameter_bytes: int) -> None:
    nearest = nearest_folder(folder.root)
    copies = _COPIES + (1 if config.train.ema_decay else 0)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # and the one being written
    needed = parameter_bytes * copies * kept
    free = free_bytes(nearest)
    if free < needed:
        thing = f"the checkpoints of this run need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise UserError(thing, file=nearest, fix="free space, lower checkpoint.keep_last or choose another output_dir")
