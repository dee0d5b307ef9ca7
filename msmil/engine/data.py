"""The data set of a configuration, checked; imports no torch."""

from __future__ import annotations

from pathlib import Path

from msmil.config import Config
from msmil.types import TrainState
from shards.errors import UserError
from shards.folds import with_fold
from shards.manifest import Manifest, check_shards, read_manifest
from shards.remote.folder import RemoteOptions


def open_data(config: Config) -> Manifest:
    """Read and check the data set of a configuration: shards whole, labels known, its fold in place.

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
    check_shards(manifest)
    data = config.data
    if data.folds == "none":
        return manifest
    return with_fold(
        manifest, folds=data.folds, fold=data.fold, seed=data.fold_seed, labels=data.labels, rule=data.fold_rule
    )


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
