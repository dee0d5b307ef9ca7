"""The parts of the benchmarks: arithmetic is counted right, the largest batch is found, modes are all there."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from msmil.engine.bench.arithmetic import count_flops, matmul_flops_per_s
from msmil.engine.bench.clock import in_turn, peak_of
from msmil.engine.bench.images import draw, pack_images
from msmil.engine.bench.largest import largest_batch
from msmil.engine.bench.plain import modes
from msmil.engine.memory import OutOfMemory
from shards.reader import ShardReader

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("groups", [1, 8])
def test_a_backward_is_two_forwards_with_groups_too(groups: int) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(2, 8, 16, 16, requires_grad=True)
    forward = 2 * 2 * (16 * 16) * 8 * (8 // groups) * 9
    with torch.no_grad():
        assert count_flops(lambda: conv(image)) == forward
    assert count_flops(lambda: conv(image).sum().backward()) == 3 * forward
    conv.requires_grad_(False)
    assert count_flops(lambda: conv(image).sum().backward()) == 2 * forward, "no gradient of the weights"


def test_a_matrix_product_has_a_speed() -> None:
    assert 1e8 < matmul_flops_per_s(torch.float32, CPU, rounds=1) < 1e15


@pytest.mark.parametrize("fits", [1, 2, 3, 37, 64, 100])
def test_the_largest_batch_on_a_gpu_is_found_by_trying(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of everything that tests have left
    tried: list[int] = []

    def step(images: int) -> None:
        tried.append(images)
        if images > fits:
            raise OutOfMemory("full", fix="less")

    told: list[str] = []
    found = largest_batch(step, GPU, tell=told.append)
    assert [line.split(" (")[0] for line in told] == [
        f"{images} images {'fit' if images <= fits else 'do not fit'}" for images in tried
    ]
    assert found.images <= fits < found.images + found.grain
    assert found.grain <= max(1, found.images // 16)
    assert len(tried) == len(set(tried)) <= 13


def test_what_never_fails_ends_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)
    found = largest_batch(lambda _: None, GPU, most=64)
    assert (found.images, found.grain) == (64, 0)
    nothing = largest_batch(lambda _: (_ for _ in ()).throw(OutOfMemory("full", fix="less")), GPU)
    assert nothing.images == 0


def test_on_a_cpu_it_is_measured_and_not_tried() -> None:
    seen: list[int] = []

    def step(images: int) -> None:
        seen.append(images)
        torch.ones(images * 25_000_000)

    found = largest_batch(step, CPU)
    assert max(seen) == 3
    assert found.per_image_bytes == pytest.approx(100e6, rel=0.2)
    assert not found.tried


def test_the_peak_of_an_action() -> None:
    before = peak_of(lambda: None, CPU)
    assert peak_of(lambda: torch.ones(50_000_000), CPU) - before == pytest.approx(200e6, rel=0.2)


def test_actions_take_turns() -> None:
    done: list[str] = []
    times = in_turn({name: lambda name=name: done.append(name) for name in "ab"}, 3, CPU)
    assert done == list("ababab")
    assert set(times) == {"a", "b"}


def test_each_mode_alone_and_all_together() -> None:
    assert [str(mode) for mode in modes("each")] == [
        "fp32 contiguous eager",
        "fp32 channels_last eager",
        "bf16 contiguous eager",
        "bf16 channels_last eager",
        "fp32 contiguous compiled",
        "bf16 channels_last compiled",
    ]
    assert len({str(mode) for mode in modes("all")}) == 8


def test_drawn_images_are_packed_as_they_are(tmp_path) -> None:
    images = [draw((64, 48), seed) for seed in (0, 1)]
    assert (images[0] == 0).mean() > 0.3, "air"
    manifest = pack_images(tmp_path, images, codec="zstd", labels=["Mass"], number=5)
    assert len(manifest.rows("train")) == 5
    names = manifest.text("image_id", range(5))
    with ShardReader(manifest) as reader:
        for row, name in enumerate(names):
            np.testing.assert_array_equal(reader.read(row), images[int(name) % 2])
