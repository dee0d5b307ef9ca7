"""The arithmetic of scaling, by cases that were computed by hand."""

from __future__ import annotations

import pytest

from msmil.engine.bench.projection import (
    Engine,
    Links,
    Parameters,
    Reading,
    Step,
    Traffic,
    cores_needed,
    ddp_buckets,
    most_ranks,
    project,
    read_bytes_per_s,
    ring_rate,
    ring_seconds,
    sent_bytes,
    traffic,
    worlds,
)

MIB = 2**20
SIZES = Parameters(
    trained_bytes=36_000_000, divided_bytes=30_000_000, whole_bytes=12_000_000, whole_tensors=200, groups=4
)
STEP = Step(images=4, seconds=0.1, backward_s=0.06)
LINKS = Links(name="", gpu_bytes_per_s=200e9, node_bytes_per_s=10e9, latency_s=0.0)


def test_a_ring_sends_nothing_alone_and_nearly_twice_the_payload_among_many() -> None:
    assert sent_bytes("all_reduce", 800, 1) == 0
    assert sent_bytes("all_reduce", 800, 2) == 800
    assert sent_bytes("all_reduce", 800, 8) == 1400
    assert sent_bytes("all_gather", 800, 8) == sent_bytes("reduce_scatter", 800, 8) == 700


@pytest.mark.parametrize(
    ("engine", "accumulation", "sent"),
    [
        # 8 ranks: 7/8 of the payload, twice for a sum
        ("ddp", 4, 63e6),
        ("zero0", 4, 63e6),
        ("zero1", 4, 63e6 + 31.5e6),
        ("zero2", 1, 63e6 + 31.5e6),
        ("zero2", 4, 4 * 63e6 + 31.5e6),
        # scattered sums of 36 MB, divided weights of 30 MB, whole ones of 12 MB
        ("zero3", 1, 31.5e6 + 26.25e6 + 10.5e6),
        ("zero3", 2, 2 * 31.5e6 + 2 * 26.25e6 + 10.5e6),
    ],
)
def test_volume_of_a_step(engine: Engine, accumulation: int, sent: float) -> None:
    parts = traffic(engine, SIZES, accumulation)
    assert sum(sent_bytes(part.kind, part.payload_bytes, 8) for part in parts) == pytest.approx(sent)


def test_zero_3_gathers_every_small_tensor_by_itself() -> None:
    links = Links(name="", gpu_bytes_per_s=1e15, node_bytes_per_s=1e15, latency_s=1e-5)
    # one scatter, one gather, 200 gathers, five sums of single numbers (there and back)
    parts = traffic("zero3", SIZES, 1)
    assert sum(ring_seconds(part, links, 64, 8) for part in parts) == pytest.approx((1 + 1 + 200 + 2 * 5) * 63e-5)


def test_ddp_cuts_gradients_into_a_small_bucket_and_large_ones() -> None:
    assert [ddp_buckets(size) for size in (1, MIB, MIB + 1, 26 * MIB, 26 * MIB + 1)] == [1, 1, 2, 2, 3]


def test_the_slower_of_link_and_network_counts() -> None:
    assert ring_rate(LINKS, 8, 8) == 200e9
    assert ring_rate(LINKS, 16, 8) == 10e9
    fast = Links(name="", gpu_bytes_per_s=20e9, node_bytes_per_s=320e9)
    assert ring_rate(fast, 16, 8) == 20e9, "eight network cards do not make one GPU's link faster"


def test_latency_counts_every_message_of_the_ring() -> None:
    links = Links(name="", gpu_bytes_per_s=1e12, node_bytes_per_s=1e12, latency_s=1e-5)
    part = Traffic(kind="all_reduce", payload_bytes=0, calls=3)
    assert ring_seconds(part, links, 512, 8) == pytest.approx(3 * 2 * 511 * 1e-5)


def projected(engine: Engine, links: Links, ranks: int, *, overlap: bool) -> tuple[float, float]:
    found = project(
        engine, SIZES, STEP, links, ranks=ranks, gpus_per_node=8, accumulation=1, overlap=overlap
    )  # fmt: skip
    assert found.images_per_s == pytest.approx(ranks * 40 * found.efficiency)
    return found.exposed_s, found.efficiency


def test_what_is_not_hidden_is_added_to_the_step() -> None:
    # 16 ranks: 2 * 15/16 * 36 MB over 10 GB/s are 6.75 ms beside 100 ms
    exposed_s, efficiency = projected("ddp", LINKS, 16, overlap=False)
    assert exposed_s == pytest.approx(6.75e-3)
    assert efficiency == pytest.approx(100 / 106.75)
    # hidden behind 60 ms of backward, but for the last of three buckets
    exposed_s, efficiency = projected("ddp", LINKS, 16, overlap=True)
    assert exposed_s == pytest.approx(2.25e-3)
    assert efficiency == pytest.approx(100 / 102.25)


def test_a_slow_link_outlasts_the_backward() -> None:
    slow = Links(name="", gpu_bytes_per_s=1e9, node_bytes_per_s=0.5e9, latency_s=0.0)
    # 135 ms, of which 60 ms hide
    assert projected("ddp", slow, 16, overlap=True)[0] == pytest.approx(75e-3)


def test_only_ddp_hides_anything() -> None:
    assert projected("zero2", LINKS, 16, overlap=True) == projected("zero2", LINKS, 16, overlap=False)


def test_what_loader_and_file_system_must_give() -> None:
    reading = Reading(image_bytes=1.5e6, decode_s=0.02)
    assert cores_needed(reading, 100) == pytest.approx(2)
    assert read_bytes_per_s(reading, 100) == pytest.approx(150e6)
    assert most_ranks(2e9, 150e6) == 13


def test_worlds_double_up_to_the_largest() -> None:
    assert [list(worlds(n)) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
