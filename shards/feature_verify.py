"""Read a folder of features again, everything in it, and tell all that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.feature_reader import FeatureReader
from shards.features import Features, read_features
from shards.pool import default_processes, run_tasks
from shards.remote.whole import tars_here
from shards.verify import Problem, VerifyReport, check_file, check_foreign_tars


@dataclass(frozen=True, slots=True)
class _Task:
    features: Features
    shard: int


def verify_features(directory: str | Path, *, processes: int | None = None, quiet: bool = False) -> VerifyReport:
    """Check the size and checksum of every tar, the checksum, shapes and type of the features of every image, and that
    no tar lies there that manifest.json does not name.

    Args:
        directory: what `msmil extract` wrote.
        processes: how many at a time; by default one per core.
        quiet: show no progress.

    Raises:
        UserError: the manifest or features.arrow cannot be read, or a tar is missing or has another size.
    """
    features = read_features(directory)
    checked = run_tasks(
        _check_shard,
        [_Task(features, shard) for shard in range(len(features.shards))],
        processes=processes or default_processes(),
        what="verifying",
        unit="images",
        total=len(features),
        quiet=quiet,
    )
    problems = [problem for shard in checked for problem in shard]
    problems += check_foreign_tars(features)
    return VerifyReport(
        directory=features.where,
        images=len(features),
        shards=len(features.shards),
        problems=tuple(problems),
        made="extracted",
    )


def _check_shard(task: _Task, tick: Callable[[], object]) -> list[Problem]:
    info = task.features.shards[task.shard]
    try:
        with tars_here(task.features, task.shard) as features:
            return _check_shard_here(features, task.shard, tick)
    except UserError as error:  # it cannot be downloaded
        return [Problem(info.name, error.thing)]


def _check_shard_here(features: Features, shard: int, tick: Callable[[], object]) -> list[Problem]:
    info = features.shards[shard]
    things = check_file(features.directory / info.name, info)
    with FeatureReader(features, all_checksums=True) as reader:
        for row in features.rows(shard):
            tick()
            try:
                reader.read(row)
            except UserError as error:
                things.append(error.thing)
    return [Problem(info.name, thing) for thing in things]
