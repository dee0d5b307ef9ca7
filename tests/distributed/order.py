"""Legs with every option of the order, and with shards of unusual sizes, for worlds of 1, 2 and 3 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shards.pack_plan import cut
from shards.sources.base import SourceRow
from tests.archives import GroupedArchive, make_grouped_archive, pack_grouped
from tests.distributed.runs import Runs, zero

STEPS, BATCH = 5, 18  # an epoch and more; no divisor of the 60 images, nor a multiple of an exam
PREDICTED = 4  # images of a rank's batch: of nine images the second rank of two has a batch more, which is short
ORDERS: dict[str, dict[str, Any]] = {
    "pad": {},
    "drop": {"last_batch": "drop"},
    "wrap": {"last_batch": "wrap"},
    "balanced": {"sampling": "class_balanced"},
    "exams": {"group_by": "exam"},
    "share": {"fraction": 0.5},
    "one_shard": {"shards": "one_shard"},
    "unequal": {"shards": "unequal"},
}
TOO_FEW = "refused"


def pack_unusual(folder: Path) -> None:
    """The images of the fixture `packed` with one shard for each split, and with shards of 1, 2 and all others."""
    archive = make_grouped_archive(folder / "archive", exams=24)
    pack_grouped(archive, folder / "one_shard", samples_per_shard=1000)
    _pack_unequal(archive, folder / "unequal")


def _pack_unequal(archive: GroupedArchive, out: Path) -> None:
    def unequal(rows: Sequence[SourceRow], *, seed: int, samples_per_shard: int) -> list[list[SourceRow]]:
        whole = cut(rows, seed=seed, samples_per_shard=samples_per_shard)
        return [part for shard in whole for part in (shard[:1], shard[1:3], shard[3:])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.pack_plan.cut", unequal)
        pack_grouped(archive, out, samples_per_shard=1000)


def order_legs(runs: Runs, ranks: int) -> list[dict[str, Any]]:
    """The legs of a world; those that only predict go on from the run `one`."""
    legs = []
    for name, words in ORDERS.items():
        data = dict(words)
        if "shards" in data:
            data["shards"] = str(runs.folder / data["shards"])
        legs.append(
            runs.leg(f"{name}_{ranks}", STEPS, train={"batch_size": BATCH}, data=data, predict="shards" in data)
        )
    goes_on = {"run": "one", "evaluate": {"batch_size": PREDICTED}, "predict": True}
    legs.append(runs.leg(f"predict_{ranks}", 0, **goes_on))
    if ranks > 1:
        legs += [
            runs.leg(f"predict_zero{stage}_{ranks}", 0, train=zero(stage), threshold=0, **goes_on) for stage in (2, 3)
        ]
    if ranks == 2:
        legs.append(runs.leg("workers", STEPS, train={"batch_size": BATCH}, data={"workers": 2}))
    if ranks == 3:
        legs.append(runs.leg(TOO_FEW, 0, train={"batch_size": 96}, refused=True))
    return legs
