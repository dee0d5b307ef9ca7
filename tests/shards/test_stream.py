"""Batches: the plan's samples with their pixels and labels, the same from any number of ranks and processes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shards.errors import UserError
from shards.manifest import Manifest, read_manifest
from shards.order import train_plan
from shards.pack import pack
from shards.reader import ShardReader
from shards.recipes import AsIs
from shards.share import _AT_ONCE, Share
from shards.sources.grouped_table import read_grouped_table
from shards.stream import evaluation_stream, train_stream
from shards.types import SPLITS, Batch
from tests.archives import LABELS, make_grouped_archive

ORDER = {"seed": 3, "epoch": 1, "batch_size": 8, "last_batch": "pad", "block_shards": 2}
LOADING = {"workers": 0, "prefetch_batches": 2, "pin_memory": False}
with_processes = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


def training(manifest, **changes):
    fields = {"labels": LABELS, "accumulation": 1, "world": 1, "rank": 0, "start_batch": 0} | ORDER | LOADING
    return train_stream(manifest, **(fields | changes))


def evaluating(manifest, rows, **changes):
    return evaluation_stream(manifest, **({"labels": LABELS, "rows": rows, "batch_size": 5} | LOADING | changes))


def plan_of(manifest, **changes):
    return train_plan(manifest, labels=LABELS, **(ORDER | changes))


def same(a: Batch, b: Batch) -> bool:
    tensors = [name for name in Batch.__slots__ if name not in ("levels", "skipped")]
    return a.skipped == b.skipped and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def broken_copy(packed: Path, folder: Path, row: int) -> Manifest:
    """The packed folder with one byte of one sample changed."""
    folder.mkdir()
    for file in packed.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    manifest = read_manifest(folder)
    shard, offset, *_ = manifest.location(row)
    with (folder / manifest.shards[shard].name).open("r+b") as tar:
        tar.seek(offset)
        tar.write(b"?")
    return manifest


def test_a_batch_holds_pixels_labels_weights_and_rows(manifest):
    plan, label_NK = plan_of(manifest), manifest.label_NK(LABELS)
    batches = list(training(manifest))
    assert len(batches) == plan.num_batches
    with ShardReader(manifest) as reader:
        for g, batch in enumerate(batches):
            rows_B, weight_B = plan.batch(g)
            assert batch.sample_B.dtype == torch.int64
            assert batch.sample_B.tolist() == rows_B.tolist()
            assert batch.weight_B.dtype == torch.float32
            assert batch.weight_B.tolist() == weight_B.tolist()
            assert batch.label_BK.dtype == torch.int8
            assert batch.label_BK.tolist() == label_NK[rows_B].tolist()
            assert batch.image_B1HW.dtype == torch.uint8
            assert batch.image_B1HW.shape == (8, 1, 64, 48)
            for image_1HW, row in zip(batch.image_B1HW, rows_B.tolist(), strict=True):
                np.testing.assert_array_equal(image_1HW[0].numpy(), reader.read(row))


def test_the_epoch_has_padding_in_this_test(manifest):
    assert len(manifest.rows("train")) % 8 > 0


def test_labels_come_in_the_order_asked_for(manifest):
    forward = next(training(manifest)).label_BK
    backward = next(training(manifest, labels=LABELS[::-1])).label_BK
    assert torch.equal(forward, backward.flip(1))
    assert not torch.equal(forward, backward)
    assert next(training(manifest, labels=LABELS[:1])).label_BK.shape == (8, 1)


def test_with_whole_exams_the_images_of_an_exam_lie_side_by_side_in_one_batch(manifest):
    batches = list(training(manifest, group_by="exam"))
    exams = [manifest.text("exam_id", batch.sample_B[batch.weight_B > 0].numpy()) for batch in batches]
    assert sorted(exam for of_batch in exams for exam in of_batch) == sorted(
        manifest.text("exam_id", manifest.rows("train"))
    )
    assert all(of_batch[i] == of_batch[i - i % 4] for of_batch in exams for i in range(len(of_batch)))
    assert len({exam for of_batch in exams for exam in set(of_batch)}) == sum(len(set(of_batch)) for of_batch in exams)


def test_class_balanced_batches_hold_as_many_of_each_label_and_of_none(manifest):
    for batch in training(manifest, sampling="class_balanced", batch_size=9, labels=LABELS[:1], last_batch="drop"):
        positives = int((batch.label_BK == 1).sum())
        assert positives in {4, 5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("changes", [{}, {"world": 2, "rank": 1, "accumulation": 2}, {"start_batch": 3}])
def test_any_number_of_processes_gives_the_same_batches_in_the_same_order(manifest, changes):
    expected = list(training(manifest, **changes))
    assert expected
    for workers in (1, 2, 5):
        batches = list(training(manifest, workers=workers, **changes))
        assert len(batches) == len(expected)
        assert all(map(same, batches, expected))


@pytest.mark.parametrize("order", [{}, {"last_batch": "wrap"}, {"sampling": "class_balanced"}, {"group_by": "exam"}])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("start_batch", [0, 2])
def test_ranks_and_micro_steps_together_make_the_global_batch(manifest, world, accumulation, start_batch, order):
    plan = plan_of(manifest, **order)
    layout = {"world": world, "accumulation": accumulation, "start_batch": start_batch} | order
    ranks = [list(training(manifest, rank=rank, **layout)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {accumulation * (plan.num_batches - start_batch)}
    assert {len(batch.sample_B) for batches in ranks for batch in batches} == {8 // world // accumulation}
    for g in range(start_batch, plan.num_batches):
        steps = range((g - start_batch) * accumulation, (g - start_batch + 1) * accumulation)
        seen = [
            pair
            for batches in ranks
            for step in steps
            for pair in zip(batches[step].sample_B.tolist(), batches[step].weight_B.tolist(), strict=True)
        ]
        assert sorted(seen) == sorted(zip(*(x.tolist() for x in plan.batch(g)), strict=True))


@with_processes
def test_an_epoch_that_is_done_gives_nothing(manifest, workers):
    assert list(training(manifest, start_batch=plan_of(manifest).num_batches, workers=workers)) == []


@with_processes
def test_evaluation_gives_the_rows_in_order_each_once(manifest, workers):
    rows = manifest.rows("test")[2:][::-1].copy()
    batches = list(evaluating(manifest, rows, workers=workers))
    assert [row for batch in batches for row in batch.sample_B.tolist()] == rows.tolist()
    assert {len(batch.sample_B) for batch in batches[:-1]} == {5}
    assert len(batches[-1].sample_B) == len(rows) % 5 > 0
    assert all((batch.weight_B == 1).all() for batch in batches)
    label_NK = manifest.label_NK(LABELS)
    assert np.concatenate([batch.label_BK for batch in batches]).tolist() == label_NK[rows].tolist()


@with_processes
@pytest.mark.parametrize(("batch_size", "left"), [(1, 0), (3, 2)])
def test_more_batches_than_are_looked_up_at_once(manifest, workers, batch_size, left):
    batches = 2 * max(workers, 1) * _AT_ONCE + 5
    row_M = np.random.default_rng(0).integers(len(manifest), size=batches * batch_size + left)
    got = list(evaluating(manifest, row_M, batch_size=batch_size, workers=workers))
    assert [len(batch.sample_B) for batch in got] == [batch_size] * batches + [left] * (left > 0)
    np.testing.assert_array_equal(torch.cat([batch.sample_B for batch in got]), row_M)
    np.testing.assert_array_equal(torch.cat([batch.label_BK for batch in got]), manifest.label_NK(LABELS, row_M))
    assert (torch.cat([batch.weight_B for batch in got]) == 1).all()
    with ShardReader(manifest) as reader:
        for row, image_1HW in zip(row_M, torch.cat([batch.image_B1HW for batch in got]), strict=True):
            np.testing.assert_array_equal(image_1HW[0], reader.read(int(row)))


@with_processes
def test_a_rank_without_samples_evaluates_nothing(manifest, workers):
    assert list(evaluating(manifest, np.empty(0, np.int64), workers=workers)) == []


@with_processes
def test_sixteen_bit_images_travel_whole(tmp_path, workers):
    archive = make_grouped_archive(tmp_path / "archive", exams=4, dtype=np.uint16)
    rows = read_grouped_table(archive.table, archive.images)
    pack(rows, tmp_path / "shards", recipe=AsIs(), codec="zstd", samples_per_shard=4, processes=1, quiet=True)
    manifest = read_manifest(tmp_path / "shards")
    batches = list(evaluating(manifest, np.arange(len(manifest)), workers=workers))
    with ShardReader(manifest) as reader:
        for batch in batches:
            assert batch.image_B1HW.dtype == torch.uint16
            for image_1HW, row in zip(batch.image_B1HW, batch.sample_B.tolist(), strict=True):
                np.testing.assert_array_equal(image_1HW[0].numpy(), reader.read(row))
    assert max(int(batch.image_B1HW.to(torch.int32).max()) for batch in batches) > 255


@with_processes
def test_a_broken_sample_is_the_readers_error_in_its_place(packed, tmp_path, workers):
    row = int(plan_of(read_manifest(packed)).batch(3)[0][4])
    manifest = broken_copy(packed, tmp_path / "broken", row)
    with pytest.raises(UserError) as expected, ShardReader(manifest) as reader:
        reader.read(row)
    stream = training(manifest, workers=workers)
    for g in range(3):
        assert next(stream).sample_B.tolist() == plan_of(manifest).batch(g)[0].tolist()
    with pytest.raises(UserError) as caught:
        next(stream)
    assert (caught.value.thing, caught.value.fix, caught.value.file) == (
        expected.value.thing, expected.value.fix, expected.value.file,
    )  # fmt: skip
    assert f"(row {row})" in str(caught.value)


@with_processes
def test_a_broken_sample_is_skipped_where_asked_for(packed, tmp_path, manifest, workers):
    plan = plan_of(manifest)
    place = 5
    row = int(plan.batch(1)[0][place])
    broken = broken_copy(packed, tmp_path / "broken", row)
    expected = list(training(manifest, accumulation=2))
    found = list(training(broken, accumulation=2, on_error="skip", workers=workers))
    told = [(n, where, text) for n, batch in enumerate(found) for where, text in batch.skipped.items()]
    assert [(n, where) for n, where, _ in told] == [(3, 1)], "in the second half of global batch 1"
    shard = manifest.location(row)[0]
    assert f"{manifest.shards[shard].name}: changed" in told[0][2]
    assert f"(row {row})" in told[0][2]
    for n, (batch, whole) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(batch.sample_B, whole.sample_B)
        assert torch.equal(batch.label_BK, whole.label_BK)
        other = torch.tensor([n != 3 or b != 1 for b in range(len(batch.sample_B))])
        assert torch.equal(batch.image_B1HW[other], whole.image_B1HW[other])
        assert torch.equal(batch.weight_B[other], whole.weight_B[other])
    assert found[3].weight_B[1] == 0
    assert not found[3].image_B1HW[1].any()


def test_padding_that_is_broken_is_no_skipped_sample(packed, tmp_path, manifest):
    rows_B, weight_B = plan_of(manifest).batch(plan_of(manifest).num_batches - 1)
    row = int(rows_B[weight_B == 0][0])
    last = list(training(broken_copy(packed, tmp_path / "broken", row), on_error="skip"))[-1]
    assert [int(last.sample_B[place]) for place in last.skipped] == [row]
    assert last.weight_B.sum() == weight_B.sum() - 1


@with_processes
def test_torchs_global_generator_is_left_alone(manifest, workers):
    before = torch.get_rng_state()
    list(training(manifest, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_refused_before_anything_is_read(manifest):
    with pytest.raises(UserError, match=r"samples for a global batch of 1000"):
        training(manifest, batch_size=1000)
    with pytest.raises(UserError, match="3 ranks x 1 accumulation"):
        training(manifest, world=3)
    with pytest.raises(UserError, match="no label 'Massss'"):
        training(manifest, labels=["Massss"])
    with pytest.raises(UserError, match="no label 'Massss'"):
        evaluating(manifest, manifest.rows("test"), labels=["Massss"])


def test_too_little_shared_memory_is_said_before_the_loader_hangs(manifest, monkeypatch):
    holds = SimpleNamespace(f_blocks=64, f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: holds)
    with pytest.raises(UserError, match=r"2 decoding processes need 196.6 kB .* 65.5 kB are free.*--shm-size"):
        training(manifest, workers=2)
    next(training(manifest, workers=0))
    holds.f_blocks = holds.f_bavail = 0  # what a file system without a limit says
    training(manifest, workers=2)


def test_the_ranks_of_a_machine_share_its_shared_memory(manifest, monkeypatch):
    """Each alone finds room; where others have taken theirs, that is no reason to refuse the last one its own."""
    holds = SimpleNamespace(f_blocks=30, f_bavail=30, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: holds)
    said = r"2 decoding processes of each of 3 ranks need 147.5 kB .* 122.9 kB in all.*--shm-size"
    with pytest.raises(UserError, match=said):
        training(manifest, workers=2, world=3, batch_size=6, node_ranks=(0, 1, 2))
    with pytest.raises(UserError, match=r"each of 3 ranks need"):
        evaluating(manifest, manifest.rows("val"), workers=2, node_ranks=(0, 1, 2))
    training(manifest, workers=2, world=3, batch_size=6, node_ranks=(0, 1))
    holds.f_blocks, holds.f_bavail = 40, 13
    training(manifest, workers=2, world=3, batch_size=6, node_ranks=(0, 1, 2))


def test_what_is_sent_to_a_process_grows_by_a_few_bytes_a_sample(manifest):
    def sent(count: int) -> int:
        row_M, counts_M = np.zeros(count, np.int32), np.ones(count, np.bool_)
        share = Share(of_fold, labels=LABELS, row_M=row_M, counts_M=counts_M, size=8)
        return len(pickle.dumps(share))

    of_fold = manifest.with_rows({split: np.arange(100_000) for split in SPLITS}, fingerprint="f")
    assert sent(1000) < 10_000
    assert sent(100_000) - sent(1000) < 99_000 * 5.1
