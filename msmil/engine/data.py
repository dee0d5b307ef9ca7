"""The data set of a configuration, checked; imports no torch."""

from __future__ import annotations

from pathlib import Path

from msmil.config import Config
from msmil.types import TrainState
from shards.errors import UserError
from shards.folds import with_fold
from shards.manifest import Manifest, check_shards, read_manifest


def open_data(config: Config) -> Manifest:
    """Read and check the data set of a configuration: shards whole (unless broken ones are skipped), labels known, its
    fold in place.

    Raises:
        UserError: as read_manifest, check_shards and with_fold; a label that the manifest does not have.
    """
    manifest = read_manifest(config.data.shards)
    for label in config.data.labels:
        if label not in manifest.labels:
            fix = f"choose from {', '.join(manifest.labels)}"
            raise UserError(f"data.labels names {label!r}, which is not packed", file=manifest.directory, fix=fix)
    data = config.data
    if data.on_error == "stop":
        check_shards(manifest)  # otherwise what is broken is met, and counted, where it is read
    if data.folds == "none":
        return manifest
    return with_fold(
        manifest, folds=data.folds, fold=data.fold, seed=data.fold_seed, labels=data.labels, rule=data.fold_rule
    )


def check_trained_on(checkpoint: Path, state: TrainState, manifest: Manifest) -> None:
    """Refuse to go on with other images than those a checkpoint was trained on.

    Raises:
        UserError: with both fingerprints.
    """
    before, now = state.data_fingerprint, manifest.fingerprint
    if before != now:
        thing = f"was trained on data with fingerprint {before[:12]}, {manifest.directory} has {now[:12]}"
        fix = "give the shards it was trained on; to train on others choose another name, to judge others use --shards"
        raise UserError(thing, file=checkpoint, fix=fix)
