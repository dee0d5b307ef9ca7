"""Whole exams: all images of an exam side by side in one global batch, each image once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.plan import EpochPlan

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=60)


def make_plan(sizes, **changes):
    exam_M = np.repeat(np.arange(len(sizes)) * 7, sizes)
    fields = {
        "rows_M": np.arange(len(exam_M)) * 2,
        "shard_M": np.arange(len(exam_M)) // 10,
        "seed": 3,
        "epoch": 0,
        "batch_size": 8,
        "last_batch": "pad",
        "block_shards": 2,
        "exam_M": exam_M,
    }
    return EpochPlan(**(fields | changes))


def held(plan):
    """The exams that each batch holds in order, as [(exam, its rows)]."""
    exam_of = dict(zip(plan.rows_M.tolist(), plan.exam_M.tolist(), strict=True))
    batches = []
    for rows_B, filled in zip(plan.rows_GB.tolist(), plan.filled_G.tolist(), strict=True):
        runs: list[tuple[int, list[int]]] = []
        for row in rows_B[:filled]:
            if not runs or runs[-1][0] != exam_of[row]:
                runs.append((exam_of[row], []))
            runs[-1][1].append(row)
        batches.append(runs)
    return batches


@given(sizes=SIZES, batch_size=st.integers(6, 14), seed=st.integers(0, 2**63), epoch=st.integers(0, 50))
def test_every_exam_is_whole_and_once_and_a_batch_is_closed_when_none_fits(sizes, batch_size, seed, epoch):
    if sum(sizes) < batch_size:
        sizes = [*sizes, *[6] * 3]
    plan = make_plan(sizes, batch_size=batch_size, seed=seed, epoch=epoch)
    batches = held(plan)
    exams = [exam for runs in batches for exam, _ in runs]
    assert sorted(exams) == sorted(set(plan.exam_M.tolist()))
    for exam, rows in (run for runs in batches for run in runs):
        assert rows == plan.rows_M[plan.exam_M == exam].tolist()
    for g, runs in enumerate(batches):
        gap = batch_size - sum(len(rows) for _, rows in runs)
        assert all(len(rows) > gap for later in batches[g + 1 :] for _, rows in later)
    assert np.isin(plan.rows_GB, plan.rows_M).all()
    for rows_B, filled in zip(plan.rows_GB.tolist(), plan.filled_G.tolist(), strict=True):
        assert set(rows_B) == set(rows_B[:filled]), "padding repeats images of its own batch"


def test_exams_of_four_fill_batches_without_gaps():
    plan = make_plan([4] * 11)
    assert plan.filled_G.tolist() == [8, 8, 8, 8, 8, 4]


def test_sizes_are_mixed_over_the_epoch():
    """The few small exams do not all come at the end, nor all together."""
    plan = make_plan([4] * 80 + [2] * 20)
    small = [g for g, runs in enumerate(held(plan)) for _, rows in runs if len(rows) == 2]
    assert min(small) < 5
    assert plan.num_batches == 45
    assert max(small) > 40
    assert np.bincount(small).max() <= 2


def test_which_exams_share_a_batch_changes_from_epoch_to_epoch():
    pairs = [{frozenset(exam for exam, _ in runs) for runs in held(make_plan([4] * 40, epoch=e))} for e in (0, 1)]
    assert len(pairs[0] & pairs[1]) < 5


def test_an_exam_larger_than_a_global_batch_is_refused():
    with pytest.raises(UserError, match=r"largest exam has 9 images, a global batch 8. Fix: raise .* at least 9"):
        make_plan([4, 9, 4])
