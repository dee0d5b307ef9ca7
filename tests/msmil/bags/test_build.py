"""From stored images to bags: the steps in their order."""

from __future__ import annotations

import pytest
import torch

from msmil.bags.augment import apply, draw
from msmil.bags.build import BagMaker
from msmil.bags.normalise import local_contrast, standardise, to_unit
from msmil.bags.tiling import make_bag
from msmil.config import AugmentConfig, BagConfig

AUGMENT = AugmentConfig(rotation_deg=10, gamma=0.2, noise_sd=0.02, cutout_count=1, cutout_px=8)
BLACK = (0 - 0.3) / 0.2


def maker(in_channels=1, seed=7, **changes):
    fields = {
        "instances": "tiles",
        "tile_size_px": 32,
        "mean": 0.3,
        "std": 0.2,
        "augment": AUGMENT,
        "local_contrast": 2.0,
    }
    return BagMaker(BagConfig(**(fields | changes)), in_channels=in_channels, seed=seed)


def stored(count=3, height=50, width=40, dtype=torch.uint8):
    largest = torch.iinfo(dtype).max
    unit = torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(0))
    image = (unit * largest).to(torch.int32)
    image[..., 25:] = 0
    return image.to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_the_steps_come_in_their_order(dtype):
    image, sample_B = stored(dtype=dtype), torch.tensor([3, 1, 2])
    bag = maker()(image, augment=(4, sample_B))
    x = apply(to_unit(image), draw(AUGMENT, seed=7, epoch=4, sample_B=sample_B))
    x = standardise(local_contrast(x, gain=2.0, sigma_px=3.0), mean=0.3, std=0.2)
    expected = make_bag(x, maker().config, in_channels=1, black=BLACK)
    assert torch.equal(bag.tiles_BNCPP, expected.tiles_BNCPP)
    assert bag.tiles_BNCPP.dtype == torch.float32
    assert bag.tiles_BNCPP.shape == (3, 4, 1, 32, 32)
    assert torch.equal(bag.pad_left_B, expected.pad_left_B)


def test_without_augmentation_only_the_stored_pixels_count():
    image = stored()
    bag = maker(local_contrast=0.0)(image, augment=None)
    x = (image.float() / 255 - 0.3) / 0.2
    torch.testing.assert_close(bag.tiles_BNCPP, make_bag(x, maker().config, in_channels=1, black=BLACK).tiles_BNCPP)


def test_an_image_gives_the_same_bag_alone_and_in_a_batch():
    image, samples = stored(), [9, 4, 5]
    together = maker()(image, augment=(1, torch.tensor(samples)))
    for b, sample in enumerate(samples):
        alone = maker()(image[b : b + 1], augment=(1, torch.tensor([sample])))
        torch.testing.assert_close(alone.tiles_BNCPP[0], together.tiles_BNCPP[b], atol=1e-4, rtol=0)
        assert alone.pad_left_B[0] == together.pad_left_B[b]


@pytest.mark.parametrize("instances", ["tiles", "image"])
@pytest.mark.parametrize("gain", [0.0, 2.0])
def test_an_all_black_image_is_black_everywhere(instances, gain):
    make = maker(instances=instances, local_contrast=gain, in_channels=3)
    bag = make(torch.zeros(2, 1, 50, 40, dtype=torch.uint16), augment=(0, torch.tensor([1, 2])))
    torch.testing.assert_close(bag.tiles_BNCPP, torch.full_like(bag.tiles_BNCPP, BLACK))
    assert bag.tiles_BNCPP.shape[2] == 3


def test_air_and_padding_have_one_value():
    bag = maker(instances="image", pad_multiple_px=64)(stored(), augment=None)
    padded = bag.tiles_BNCPP[:, 0, 0]
    assert bag.padded_hw == (64, 64)
    assert (padded == torch.tensor(BLACK)).float().mean(dim=(1, 2)).min() >= 1 - 50 * 25 / 64**2


def test_autocast_does_not_touch_the_pixels():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = maker()(stored(), augment=(0, torch.tensor([1, 2, 3])))
    outside = maker()(stored(), augment=(0, torch.tensor([1, 2, 3])))
    assert inside.tiles_BNCPP.dtype == torch.float32
    assert torch.equal(inside.tiles_BNCPP, outside.tiles_BNCPP)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_bags_that_a_cpu_makes():
    steady = AugmentConfig(rotation_deg=10, gamma=0.2, cutout_count=1, cutout_px=8)  # noise is drawn on the device
    image, augment = stored(dtype=torch.uint16), (1, torch.tensor([3, 4, 5]))
    cpu = maker(augment=steady)(image, augment=augment)
    gpu = maker(augment=steady)(image.cuda(), augment=augment)
    assert gpu.tiles_BNCPP.is_cuda
    assert gpu.pad_left_B.is_cuda
    assert torch.equal(gpu.pad_left_B.cpu(), cpu.pad_left_B)
    torch.testing.assert_close(gpu.tiles_BNCPP.cpu(), cpu.tiles_BNCPP, atol=1e-2, rtol=0)
