"""Class-balanced sampling: the classes in turn, and their members round and round, exact in every batch and epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.balance import draw_share, label_classes
from shards.errors import UserError
from shards.plan import EpochPlan

UNKNOWN = -1
ONE_CLASS = st.sampled_from([(1, 0), (0, 1), (0, 0), (0, 0), (0, UNKNOWN), (1, UNKNOWN), (UNKNOWN, UNKNOWN)])


def make_plan(class_MC, *, shards=3, **changes):
    samples = len(class_MC)
    fields = {
        "rows_M": np.arange(samples),
        "shard_M": np.arange(samples) * shards // samples,
        "seed": 3,
        "epoch": 0,
        "batch_size": 4,
        "last_batch": "pad",
        "block_shards": 2,
        "class_MC": class_MC,
    }
    return EpochPlan(**(fields | changes))


def drawn(plan):
    """The samples that each batch draws, padding left out."""
    return [rows_B[:filled].tolist() for rows_B, filled in zip(plan.rows_GB, plan.filled_G, strict=True)]


def counted(plan):
    return Counter(sample for batch in drawn(plan) for sample in batch)


def test_classes_are_each_labels_positives_and_the_rest_that_is_known():
    label_MK = np.array([[1, 0], [1, 1], [0, 1], [0, 0], [0, UNKNOWN], [UNKNOWN, 1], [UNKNOWN, UNKNOWN]], np.int8)
    assert label_classes(label_MK, ["Mass", "Calc"]).astype(int).tolist() == [
        [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0],
    ]  # fmt: skip


def test_with_several_labels_the_rest_may_be_empty():
    label_MK = np.array([[1, 0], [0, 1], [1, 1]], np.int8)
    assert label_classes(label_MK, ["Mass", "Calc"]).shape == (3, 2)


@pytest.mark.parametrize(
    ("label_MK", "said"),
    [
        ([[0, 1], [UNKNOWN, 0]], "label Mass has no positives to draw"),
        ([[1], [UNKNOWN]], "label Mass has no known negatives to draw"),
    ],
)
def test_a_class_without_members_is_refused(label_MK, said):
    with pytest.raises(UserError, match=rf"{said}.*Fix: set data.sampling: uniform"):
        label_classes(np.array(label_MK, np.int8), ["Mass", "Calc"][: len(label_MK[0])])


@given(
    more=st.lists(ONE_CLASS, min_size=1, max_size=40),
    batch_size=st.integers(1, 4),
    last_batch=st.sampled_from(["pad", "drop", "wrap"]),
    seed=st.integers(0, 2**63),
    far=st.integers(0, 10_000),
)
@settings(max_examples=40)
def test_draws_are_as_even_as_can_be_in_every_batch_in_every_epoch_and_over_the_run(
    more, batch_size, last_batch, seed, far
):
    label_MK = np.array([(1, 0), (0, 1), (0, 0), *more], np.int8)
    class_MC = label_classes(label_MK, ["Mass", "Calc"])
    words = {"batch_size": batch_size, "last_batch": last_batch, "seed": seed}
    whole, rest = divmod(len(label_MK), batch_size)
    draws = {"pad": len(label_MK), "drop": whole * batch_size, "wrap": (whole + (rest > 0)) * batch_size}[last_batch]
    run: Counter[int] = Counter()
    for n, epoch in enumerate([0, 1, 2, far]):
        plan = make_plan(class_MC, epoch=epoch, **words)
        assert all(even(class_MC, Counter(batch), members=False) for batch in drawn(plan))
        assert counted(plan).total() == draws
        assert even(class_MC, counted(plan), members=True)
        if n < 3:
            run += counted(plan)
            assert even(class_MC, run, members=True)


def even(class_MC, counts, *, members):
    """Whether the classes have equally many draws to within one, and their members of theirs; nothing else is drawn."""
    per_class = [[counts[sample] for sample in np.flatnonzero(member_M).tolist()] for member_M in class_MC.T]
    sums = [sum(draws) for draws in per_class]
    assert sum(sums) == counts.total()
    return spread(sums) <= 1 and (not members or all(spread(draws) <= 1 for draws in per_class))


def spread(numbers):
    return max(numbers) - min(numbers)


def test_the_check_above_can_fail():
    class_MC = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    assert even(class_MC, Counter([0, 1, 2, 3]), members=True)
    assert not even(class_MC, Counter([0, 1, 1, 3]), members=False)
    assert not even(class_MC, Counter([0, 0, 2, 3]), members=True)


def test_rare_positives_come_often_and_negatives_take_turns():
    class_MC = label_classes(np.array([[1]] * 5 + [[0]] * 95, np.int8), ["Mass"])
    epochs = [counted(make_plan(class_MC, epoch=epoch)) for epoch in range(19)]
    for counts in epochs:
        assert [counts[sample] for sample in range(5)] == [10] * 5
        assert sum(counts[sample] for sample in range(5, 100)) == 50
        assert max(counts[sample] for sample in range(5, 100)) == 1
    run = sum(epochs, Counter())
    assert {run[sample] for sample in range(5, 100)} == {10}


def test_a_sample_is_drawn_by_each_of_its_classes():
    class_MC = label_classes(np.array([[1, 1]] * 2 + [[1, 0]] * 2 + [[0, 1]] * 2 + [[0, 0]] * 6, np.int8), ["M", "C"])
    counts = counted(make_plan(class_MC))
    assert [counts[sample] for sample in range(12)] == [2, 2, 1, 1, 1, 1] + [counts[s] for s in range(6, 12)]
    assert sorted(counts[sample] for sample in range(6, 12)) == [0, 0, 1, 1, 1, 1]


def test_no_column_has_always_the_same_class():
    class_MC = label_classes(np.array([[1], [0]] * 200, np.int8), ["Mass"])
    rows_GB = make_plan(class_MC, batch_size=2).rows_GB
    assert 0.4 < class_MC[rows_GB[:, 0], 0].mean() < 0.6


def test_the_share_of_draws_is_what_a_long_run_draws():
    label_MK = np.array([[1, 1]] + [[1, 0]] * 3 + [[0, 1]] * 2 + [[0, 0]] * 5 + [[UNKNOWN, UNKNOWN]], np.int8)
    class_MC = label_classes(label_MK, ["Mass", "Calc"])
    counts = sum((counted(make_plan(class_MC, epoch=epoch)) for epoch in range(300)), Counter())
    share_M = np.array([counts[sample] for sample in range(12)]) / counts.total()
    np.testing.assert_allclose(draw_share(class_MC), share_M, atol=1e-3)
    assert draw_share(class_MC).sum() == pytest.approx(1)
