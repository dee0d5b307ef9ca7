"""Memory of batches is used again when nothing refers to them any more, and never before."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.codecs import LEAD_BYTES
from shards.manifest import Manifest, read_manifest
from shards.share import Share
from shards.slots import Slots, slots_for
from shards.stream import evaluation_stream
from shards.types import Batch
from tests.archives import LABELS
from tests.shards.test_stream import broken_copy, with_processes

SIZE = 4
PREFETCH = 1


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


def stream(manifest: Manifest, workers: int) -> Iterator[Batch]:
    return evaluation_stream(
        manifest,
        labels=LABELS,
        rows=np.arange(len(manifest)),
        batch_size=SIZE,
        workers=workers,
        prefetch_batches=PREFETCH,
        pin_memory=False,
    )


def slots(**changes) -> Slots:
    return Slots((2, 1, 3, 5), **({"dtype": "uint16", "writers": 1, "per_writer": 2, "shared": False} | changes))


def test_a_slot_is_free_again_with_the_last_reference_to_its_batch():
    memory = slots()
    first, second = memory.claim(0), memory.claim(0)
    assert (first, second) == (0, 1)
    assert memory.claim(0) is None
    memory.room(first)[LEAD_BYTES:].view(np.uint16)[:] = 40_000
    whole = memory.tensor(first, 2)
    part = whole[1:]
    del whole
    assert memory.claim(0) is None, "a view still refers to it"
    assert part.dtype == torch.uint16
    assert part.tolist() == [[[[40_000] * 5] * 3]]
    del part
    assert memory.claim(0) == first


def test_writers_have_slots_of_their_own():
    memory = slots(writers=3)
    assert [memory.claim(writer) for writer in (1, 1, 1, 0, 2)] == [2, 3, None, 0, 4]


def test_a_batch_is_sent_without_its_images_and_found_with_them():
    memory = slots()
    slot = memory.claim(0)
    room_R = memory.room(slot)
    room_R[LEAD_BYTES:] = 7
    rest = Batch(None, torch.zeros(1, 2), torch.ones(1), torch.tensor([5]))
    sent = pickle.dumps(memory.sent(slot, rest))
    batch = pickle.loads(sent)  # our own
    assert batch.sample_B.tolist() == [5]
    assert batch.image_B1HW.data_ptr() == room_R.ctypes.data + LEAD_BYTES
    assert batch.image_B1HW.shape == (1, 1, 3, 5)
    del batch
    assert memory.claim(0) == 0


@with_processes
def test_a_consumer_that_takes_one_batch_after_the_other_uses_the_same_memory(manifest, workers):
    places = set()
    for batch in stream(manifest, workers):
        places.add(batch.image_B1HW.data_ptr())
    assert len(places) <= max(workers, 1) * slots_for(PREFETCH if workers else 0)
    assert len(manifest) // SIZE > 2 * len(places), "otherwise this shows nothing"


@with_processes
def test_a_consumer_that_keeps_batches_finds_them_unchanged(manifest, workers):
    """More batches than there are slots, and views of some that are dropped."""
    kept = [batch.part(slice(1, 3)) if g % 3 else batch for g, batch in enumerate(stream(manifest, workers))]
    gc.collect()
    assert len({batch.image_B1HW.data_ptr() for batch in kept}) == len(kept)
    for g, batch in enumerate(kept):
        [again] = islice(stream(manifest, 0), g, g + 1)
        expected = again.part(slice(1, 3)) if g % 3 else again
        assert torch.equal(batch.image_B1HW, expected.image_B1HW)


def test_images_outlive_their_stream(manifest):
    batches = stream(manifest, 0)
    image_B1HW = next(batches).image_B1HW
    before = image_B1HW.clone()
    batches.close()
    del batches
    gc.collect()
    assert torch.equal(image_B1HW, before)


def test_a_skipped_image_shows_nothing_of_the_batch_before_it(packed, tmp_path):
    broken = broken_copy(packed, tmp_path / "broken", row=SIZE * 5 + 1)
    row_M = np.arange(len(broken), dtype=np.int32)
    share = Share(broken, labels=LABELS, row_M=row_M, counts_M=np.ones(len(row_M), bool), size=SIZE, on_error="skip")
    share.prepare(workers=0, prefetch_batches=0)
    share.slots.room(0)[:] = 255
    share.slots.room(1)[:] = 255
    [batch] = islice(share, 5, 6)
    assert list(batch.skipped) == [1]
    assert not batch.image_B1HW[1].any()
    assert batch.image_B1HW[0].any()
