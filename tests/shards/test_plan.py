"""The order of samples: the same global batches for every number of ranks and decoding processes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.plan import EpochPlan, evaluation_span, rank_slice, worker_batches

# (world, accumulation) that divide a batch of 16, and numbers of decoding processes
LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4), (8, 2), (16, 1)]
WORKERS = [1, 2, 3, 5]
SHARD_SIZES = [(100,), (7,) * 15, (1,) * 40, (50, 1, 1, 30, 3, 20), (16, 16, 16)]


def classes(samples):
    """Two labels, one of them rare, and the rest; the last two samples are in no class."""
    class_MC = np.zeros((samples, 3), bool)
    class_MC[::9, 0] = class_MC[::4, 1] = True
    class_MC[:, 2] = ~class_MC.any(axis=1)
    class_MC[-2:] = False
    return class_MC


def exams(samples):
    """Exams of one to five images."""
    sizes = np.resize([4, 4, 3, 4, 1, 4, 5, 2], samples)
    return np.repeat(np.arange(samples), sizes)[:samples]


KINDS = {
    "pad": lambda samples: {"last_batch": "pad"},
    "drop": lambda samples: {"last_batch": "drop"},
    "wrap": lambda samples: {"last_batch": "wrap"},
    "balanced": lambda samples: {"class_MC": classes(samples)},
    "balanced_wrap": lambda samples: {"class_MC": classes(samples), "last_batch": "wrap"},
    "exams": lambda samples: {"exam_M": exams(samples)},
}


def make_plan(shard_sizes=(10,) * 10, **changes):
    shard_M = np.repeat(np.arange(len(shard_sizes)), shard_sizes).astype(np.int32)
    rows_M = 5 + 3 * np.arange(len(shard_M))  # rows of a split are not 0..M-1
    fields = {
        "rows_M": rows_M,
        "shard_M": shard_M,
        "seed": 3,
        "epoch": 2,
        "batch_size": 16,
        "last_batch": "pad",
        "block_shards": 4,
    }
    return EpochPlan(**(fields | changes))


def arrays(plan):
    """Rows and weights [G, B] of an epoch."""
    rows, weights = zip(*map(plan.batch, range(plan.num_batches)), strict=True)
    return np.stack(rows), np.stack(weights)


def walk(plan, world, accumulation, workers, start=0):
    """What all ranks see, put together again: per global batch, the (row, weight) of every column."""
    slices = [rank_slice(plan.batch_size, world, rank, accumulation) for rank in range(world)]
    shares = [worker_batches(plan.num_batches, start, workers, worker) for worker in range(workers)]
    # A loader asks its processes in turn and leaves out those that have ended.
    turns = [share[turn] for turn in range(max(map(len, shares))) for share in shares if turn < len(share)]
    seen = {}
    for g in turns:
        rows_B, weight_B = plan.batch(g)
        seen[g] = [
            pair
            for columns in slices
            for part in columns
            for pair in zip(rows_B[part].tolist(), weight_B[part].tolist(), strict=True)
        ]
    assert turns == list(range(start, plan.num_batches))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_sizes", SHARD_SIZES)
def test_a_global_batch_is_the_same_set_for_every_world_accumulation_and_worker_count(shard_sizes, kind):
    plan = make_plan(shard_sizes, **KINDS[kind](sum(shard_sizes)))
    expected = {g: sorted(zip(*(x.tolist() for x in plan.batch(g)), strict=True)) for g in range(plan.num_batches)}
    for world, accumulation in LAYOUTS:
        for workers in WORKERS:
            seen = walk(plan, world, accumulation, workers)
            assert {g: sorted(pairs) for g, pairs in seen.items()} == expected


@pytest.mark.parametrize("shard_sizes", SHARD_SIZES)
def test_with_padding_every_sample_comes_exactly_once_with_weight_one(shard_sizes):
    plan = make_plan(shard_sizes, last_batch="pad")
    rows_GB, weight_GB = arrays(plan)
    assert sorted(rows_GB[weight_GB == 1].tolist()) == plan.rows_M.tolist()
    # The rest is padding: weight 0, in the last batch only, made of that batch's own samples.
    assert set(np.unique(weight_GB)) <= {0, 1}
    assert (weight_GB[:-1] == 1).all()
    assert set(rows_GB[-1]) == set(rows_GB[-1][weight_GB[-1] == 1])


@pytest.mark.parametrize("shard_sizes", SHARD_SIZES)
def test_with_drop_only_whole_batches_come_and_no_sample_twice(shard_sizes):
    plan = make_plan(shard_sizes, last_batch="drop")
    rows_GB, weight_GB = arrays(plan)
    assert rows_GB.shape == (len(plan.rows_M) // 16, 16)
    assert (weight_GB == 1).all()
    assert len(np.unique(rows_GB)) == rows_GB.size
    padded = make_plan(shard_sizes, last_batch="pad")
    np.testing.assert_array_equal(rows_GB, padded.rows_GB[: plan.num_batches])


@pytest.mark.parametrize("shard_sizes", SHARD_SIZES)
def test_with_wrap_the_last_batch_is_filled_with_the_first_samples_again(shard_sizes):
    rows_GB, weight_GB = arrays(make_plan(shard_sizes, last_batch="wrap"))
    assert (weight_GB == 1).all()
    padded, samples = make_plan(shard_sizes), sum(shard_sizes)
    assert rows_GB.ravel()[:samples].tolist() == padded.rows_GB.ravel()[:samples].tolist()
    assert rows_GB.ravel()[samples:].tolist() == rows_GB.ravel()[: rows_GB.size - samples].tolist()
    assert rows_GB.shape == padded.rows_GB.shape


@pytest.mark.parametrize("kind", KINDS)
def test_all_epochs_have_the_same_steps_and_samples_seen(kind):
    plans = [make_plan(epoch=epoch, **KINDS[kind](100)) for epoch in range(4)]
    assert len({plan.filled_G.tobytes() for plan in plans}) == 1
    assert all(plan.rows_GB.shape == (plan.num_batches, 16) for plan in plans)
    seen = int((arrays(plans[0])[1] > 0).sum())
    assert seen == plans[0].filled_G.sum() == {"drop": 96, "wrap": 112, "balanced_wrap": 112}.get(kind, 100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, 4, 5])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_resume_from_any_batch_on_any_world_goes_on_exactly(start, world, kind):
    plan = make_plan(**KINDS[kind](100))
    whole = walk(plan, world=2, accumulation=1, workers=3)
    again = make_plan(**KINDS[kind](100))  # a new process
    rest = walk(again, world=world, accumulation=1, workers=2, start=start)
    assert {g: sorted(pairs) for g, pairs in rest.items()} == {
        g: sorted(whole[g]) for g in range(start, plan.num_batches)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ_and_repeat(kind):
    words = KINDS[kind](100)
    order = make_plan(**words).rows_GB
    np.testing.assert_array_equal(order, make_plan(**words).rows_GB)
    for other in (make_plan(epoch=3, **words), make_plan(seed=4, **words)):
        assert (other.rows_GB != order).mean() > 0.8


def test_the_order_is_what_it_was_when_runs_were_first_recorded():
    plan = make_plan((3, 3, 3), batch_size=3, block_shards=2, seed=0, epoch=0)
    assert plan.rows_GB.tolist() == [[26, 17, 20], [14, 23, 29], [5, 8, 11]]


def test_a_batch_reads_from_few_shards():
    plan = make_plan((20,) * 64, block_shards=4)
    shard_of = dict(zip(plan.rows_M.tolist(), plan.shard_M.tolist(), strict=True))
    for g in range(plan.num_batches):
        # A batch lies in one block of 4 shards, or across the border of two.
        assert len({shard_of[row] for row in plan.batch(g)[0].tolist()}) <= 8
    first_block = {shard_of[row] for row in plan.rows_GB[:5].ravel().tolist()}
    assert len(first_block) == 4
    assert max(first_block) - min(first_block) > 3  # shards are permuted, not only samples


def test_samples_are_mixed_inside_a_block():
    plan = make_plan((50, 50), block_shards=2)
    half = plan.shard_M[np.searchsorted(plan.rows_M, plan.rows_GB[:3].ravel())]
    assert 0.2 < half.mean() < 0.8


@pytest.mark.parametrize("kind", ["balanced", "exams"])
def test_balanced_and_whole_exam_batches_read_from_few_shards_too(kind):
    plan = make_plan((20,) * 64, block_shards=4, **KINDS[kind](1280))
    shard_of = dict(zip(plan.rows_M.tolist(), plan.shard_M.tolist(), strict=True))
    shards = [len({shard_of[row] for row in rows_B}) for rows_B in plan.rows_GB.tolist()]
    assert np.mean(shards) < 16 * 0.7  # of three classes, or of five sizes, which lie apart; 14.2 of 64 by chance
    assert len({shard_of[row] for row in plan.rows_GB.ravel().tolist()}) == 64


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 9),
    block_shards=st.integers(1, 5),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_plan_is_a_permutation(sizes, batch_size, block_shards, seed, epoch):
    if sum(sizes) < batch_size:
        sizes = [*sizes, batch_size]
    plan = make_plan(sizes, batch_size=batch_size, block_shards=block_shards, seed=seed, epoch=epoch)
    rows_GB, weight_GB = arrays(plan)
    assert plan.num_batches == -(-sum(sizes) // batch_size) == len(rows_GB)
    assert sorted(rows_GB[weight_GB > 0].tolist()) == plan.rows_M.tolist()


def test_too_few_samples_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"10 samples .* batch of 16.*Fix: lower the batch size to at most 10"):
        make_plan((4, 6))
    with pytest.raises(UserError, match="0 samples"):
        make_plan(())


def test_a_seed_below_zero_is_refused():
    with pytest.raises(UserError, match="seed is -1"):
        make_plan(seed=-1)


@pytest.mark.parametrize(("world", "accumulation"), LAYOUTS)
def test_ranks_and_micro_steps_share_the_columns_out_evenly(world, accumulation):
    columns = [rank_slice(16, world, rank, accumulation) for rank in range(world)]
    assert {len(parts) for parts in columns} == {accumulation}
    taken = [c for parts in columns for part in parts for c in range(16)[part]]
    assert sorted(taken) == list(range(16))
    assert len({part.stop - part.start for parts in columns for part in parts}) == 1
    for m in range(accumulation):
        step = sorted(c for parts in columns for c in range(16)[parts[m]])
        assert step == list(range(m * 16 // accumulation, (m + 1) * 16 // accumulation))


@pytest.mark.parametrize(("batch_size", "world", "accumulation"), [(8, 3, 1), (8, 2, 3), (2, 4, 1), (2, 1, 4)])
def test_a_batch_that_does_not_divide_is_refused_by_name(batch_size, world, accumulation):
    message = (
        f"batch size of {batch_size} .* {world} ranks x {accumulation} accumulation.*multiple of {world * accumulation}"
    )
    with pytest.raises(UserError, match=message):
        rank_slice(batch_size, world, 0, accumulation)


@given(num_samples=st.integers(0, 500), world=st.integers(1, 17))
def test_evaluation_spans_are_disjoint_complete_and_even(num_samples, world):
    spans = [evaluation_span(num_samples, world, rank) for rank in range(world)]
    assert [i for span in spans for i in span] == list(range(num_samples))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_rows_are_ordered_fast(kind):
    words = KINDS[kind](1_000_000)
    start = time.process_time()
    plan = make_plan((500,) * 2000, batch_size=64, block_shards=16, **words)
    rows_GB = plan.rows_GB
    assert time.process_time() - start < 2.0  # `python -m tests.benchmarks.order` says how long
    assert len(rows_GB) == plan.num_batches >= 15625
