"""The data set of a configuration, checked; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msmil.config import Config
from msmil.types import TrainState
from shards.errors import UserError
from shards.folds import with_fold
from shards.manifest import Manifest, check_shards, read_manifest
from shards.order import train_plan
from shards.plan import EpochPlan
from shards.remote.folder import RemoteOptions
from shards.subset import with_fraction


def open_data(config: Config) -> Manifest:
    """Read and check the data set of a configuration: shards whole (unless broken ones are skipped), labels known, its
    fold and its share in place.

    Raises:
        UserError: as read_manifest, check_shards and with_fold; a label that the manifest does not have.
    """
    manifest = read_manifest(config.data.shards, remote_options(config))
    for label in config.data.labels:
        if label not in manifest.labels:
            fix = f"choose from {', '.join(manifest.labels)}"
            raise UserError(f"data.labels names {label!r}, which is not packed", file=manifest.place, fix=fix)
    if manifest.remote is not None:
        manifest.remote.check_disk()
    data = config.data
    if data.on_error == "stop":
        check_shards(manifest)  # otherwise what is broken is met, and counted, where it is read
    if data.folds != "none":
        manifest = with_fold(
            manifest, folds=data.folds, fold=data.fold, seed=data.fold_seed, labels=data.labels, rule=data.fold_rule
        )
    return with_fraction(manifest, fraction=data.fraction, seed=data.fraction_seed, labels=data.labels)


def first_epoch(config: Config, manifest: Manifest) -> EpochPlan:
    """The order of a configuration's first epoch; all epochs have its numbers of steps and images.

    Raises:
        UserError: as train_plan.
    """
    data = config.data
    return train_plan(
        manifest,
        seed=config.seed,
        epoch=0,
        batch_size=config.train.batch_size,
        last_batch=data.last_batch,
        block_shards=data.shuffle_block_shards,
        sampling=data.sampling,
        group_by=data.group_by,
        labels=data.labels,
    )


def describe_epoch(plan: EpochPlan, labels: Sequence[str]) -> str:
    """Steps, images and padding of an epoch in a line, and its classes where they are drawn in turn."""
    images = int(plan.filled_G.sum())
    text = f"an epoch: {plan.num_batches} steps, {images} images"
    if padding := plan.num_batches * plan.batch_size - images:
        text += f" and {padding} places of weight 0"
    if plan.class_MC is not None:
        sizes = zip((*labels, "none of these"), plan.class_MC.sum(axis=0).tolist(), strict=False)
        text += "; drawn in turn: " + ", ".join(f"{name} ({size} images)" for name, size in sizes)
        if unknown := int((~plan.class_MC.any(axis=1)).sum()):
            text += f"; never: {unknown} images without a known label"
    return text


def remote_options(config: Config) -> RemoteOptions:
    """How a configuration reads folders that lie elsewhere."""
    data = config.data
    return RemoteOptions(
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        timeout_s=data.request_timeout_s,
        retries=data.request_retries,
    )


def check_trained_on(checkpoint: Path, state: TrainState, manifest: Manifest) -> None:
    """Refuse to go on with other images than those a checkpoint was trained on.

    Raises:
        UserError: with both fingerprints.
    """
    before, now = state.data_fingerprint, manifest.fingerprint
    if before != now:
        thing = f"was trained on data with fingerprint {before[:12]}, {manifest.place} has {now[:12]}"
        fix = "give the shards it was trained on; to train on others choose another name, to judge others use --shards"
        raise UserError(thing, file=checkpoint, fix=fix)
