"""The next batch is on its way while the current one computes; tests/gpu copies for real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from msmil.engine.ahead import on_device, one_ahead
from shards.errors import UserError


def logged(events: list[str], number: int, broken: bool = False) -> Iterator[int]:
    """Batches that stand for themselves; what happens to each is written down."""

    def batches() -> Iterator[int]:
        yield from range(number)
        if broken:
            raise UserError("the tar is broken", fix="copy it again")

    def start(batch: int) -> int:
        events.append(f"start {batch}")
        return batch

    def finish(batch: int) -> int:
        events.append(f"finish {batch}")
        return batch

    return one_ahead(batches(), start, finish)


def test_each_copy_starts_before_the_batch_before_it_is_used() -> None:
    events: list[str] = []
    for batch in logged(events, 3):
        events.append(f"compute {batch}")
    assert events == [
        "start 0", "start 1", "finish 0", "compute 0", "start 2", "finish 1", "compute 1", "finish 2", "compute 2",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_order_and_number_stay(number: int) -> None:
    assert list(logged([], number)) == list(range(number))


def test_an_error_comes_behind_the_batches_before_it() -> None:
    batches = logged([], 2, broken=True)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match="the tar is broken"):
        next(batches)


def test_on_a_cpu_batches_stay_as_they_are() -> None:
    batches = iter([])
    assert on_device(batches, torch.device("cpu")) is batches
