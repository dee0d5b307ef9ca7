"""Padding with black on the side with less tissue, and tiles that lie fully inside, by y then x.

Sides, amounts and tile grids are those of the published system where both pad (method of Mourao et al., 2025).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmil.bags.tiling import make_bag, pad_with_black, padded_size, tile_hw, tile_origins, window_origins
from msmil.config import BagConfig

BLACK = -1.25


def tiles_config(side=512, overlap=0.0):
    return BagConfig(instances="tiles", tile_size_px=side, tile_overlap=overlap)


def random_images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("hw", "config", "expected"),
    [
        ((1520, 912), tiles_config(512), (1536, 1024)),
        ((1000, 700), tiles_config(256), (1024, 768)),
        ((1024, 512), tiles_config(512), (1024, 512)),  # multiples stay
        ((1520, 912), BagConfig(instances="image", pad_multiple_px=128), (1536, 1024)),
        ((384, 240), BagConfig(instances="image", pad_multiple_px=32), (384, 256)),
        ((1, 1), BagConfig(instances="image", pad_multiple_px=32), (32, 32)),
    ],
)
def test_padded_size_is_the_next_multiple(hw, config, expected):
    assert padded_size(*hw, config) == expected


@pytest.mark.parametrize(
    ("hw", "multiple", "left_top"),
    # left and top padding of standardised torch.rand(3, h, w), seed 3, as the published system chose them
    [((1520, 912), 512, (0, 16)), ((1000, 700), 256, (68, 24))],
)
def test_the_published_sides_are_chosen(hw, multiple, left_top):
    rgb = torch.rand(3, *hw, generator=torch.Generator().manual_seed(3))
    x = (rgb.mean(0) - 0.3089279).div(0.25053555408335154)[None, None]
    _, left, top = pad_with_black(x, padded_size(*hw, tiles_config(multiple)), black=BLACK)
    assert (left.item(), top.item()) == left_top


@pytest.mark.parametrize(
    ("tissue", "expected"), [("left", (0, 0)), ("right", (6, 0)), ("top", (0, 0)), ("bottom", (0, 4))]
)
def test_black_goes_to_the_side_with_less_tissue(tissue, expected):
    x = torch.full((1, 1, 12, 10), BLACK)
    half = {"left": (..., slice(0, 4)), "right": (..., slice(6, 10)), "top": (..., slice(0, 4), slice(None)),
            "bottom": (..., slice(8, 12), slice(None))}  # fmt: skip
    x[half[tissue]] = 1.0
    padded, left, top = pad_with_black(x, (16, 16), black=BLACK)
    assert (left.item(), top.item()) == expected
    assert torch.equal(padded[..., top : top + 12, left : left + 10], x)


@given(
    images=st.integers(1, 4),
    height=st.integers(2, 33),
    width=st.integers(2, 33),
    multiple=st.sampled_from([1, 4, 8, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_padding_keeps_every_pixel_and_adds_only_black_on_one_side(images, height, width, multiple, seed):
    config = BagConfig(instances="image", pad_multiple_px=multiple)
    x = random_images(images, 1, height, width, seed=seed)
    canvas_h, canvas_w = padded_size(height, width, config)
    padded, left_B, top_B = pad_with_black(x, (canvas_h, canvas_w), black=BLACK)
    assert padded.shape == (images, 1, canvas_h, canvas_w)
    for b in range(images):
        left, top = left_B[b].item(), top_B[b].item()
        assert left in (0, canvas_w - width)
        assert top in (0, canvas_h - height)
        assert torch.equal(padded[b, :, top : top + height, left : left + width], x[b])
        black_before = (x[b] == BLACK).sum()  # a pixel may happen to have that value
        assert (padded[b] == BLACK).sum() == black_before + canvas_h * canvas_w - height * width
        less_left = x[b, ..., : width // 2].double().sum() < x[b, ..., width // 2 :].double().sum()
        assert (left > 0) == (bool(less_left) and canvas_w > width)


def test_each_image_of_a_batch_is_padded_as_if_it_were_alone():
    x = random_images(6, 1, 20, 13)
    together, left_B, top_B = pad_with_black(x, (32, 16), black=BLACK)
    for b in range(6):
        alone, left, top = pad_with_black(x[b : b + 1], (32, 16), black=BLACK)
        assert torch.equal(alone[0], together[b])
        assert (left.item(), top.item()) == (left_B[b].item(), top_B[b].item())
    assert len(set(left_B.tolist())) == 2  # both sides occur


@pytest.mark.parametrize(
    ("overlap", "count", "xs", "ys"),
    [
        (0.0, 6, range(0, 513, 512), range(0, 1025, 512)),
        (0.5, 15, range(0, 513, 256), range(0, 1025, 256)),
        (0.75, 45, range(0, 513, 128), range(0, 1025, 128)),
    ],
)
def test_tiles_of_the_published_sizes(overlap, count, xs, ys):
    origins = tile_origins((1536, 1024), tiles_config(512, overlap)).tolist()
    assert origins == [[x, y] for y in ys for x in xs]
    assert len(origins) == count


@pytest.mark.parametrize(("side", "overlap", "count", "last"), [(256, 0.0, 24, 768), (256, 0.75, 13 * 21, 768)])
def test_tiles_that_would_leave_the_image_are_left_out(side, overlap, count, last):
    origins = tile_origins((1536, 1024), tiles_config(side, overlap))
    assert len(origins) == count
    assert origins[:, 0].max() == last


@given(
    tiles_y=st.integers(1, 4),
    tiles_x=st.integers(1, 4),
    side=st.sampled_from([4, 8, 10]),
    overlap=st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_every_tile_holds_the_pixels_at_its_origin(tiles_y, tiles_x, side, overlap):
    config = tiles_config(side, overlap)
    x = random_images(2, 1, tiles_y * side - 1, tiles_x * side - 2)
    bag = make_bag(x, config, in_channels=1, black=BLACK)
    padded, *_ = pad_with_black(x, bag.padded_hw, black=BLACK)
    for n, (x0, y0) in enumerate(bag.origin_N2.tolist()):
        assert x0 + side <= bag.padded_hw[1]
        assert y0 + side <= bag.padded_hw[0]
        assert torch.equal(bag.tiles_BNCPP[:, n], padded[:, :, y0 : y0 + side, x0 : x0 + side])


def test_tiles_without_overlap_put_together_are_the_padded_image():
    x = random_images(3, 1, 45, 30)
    bag = make_bag(x, tiles_config(16), in_channels=1, black=BLACK)
    again = torch.full((3, 1, *bag.padded_hw), float("nan"))
    for n, (x0, y0) in enumerate(bag.origin_N2.tolist()):
        again[:, :, y0 : y0 + 16, x0 : x0 + 16] = bag.tiles_BNCPP[:, n]
    padded, left_B, top_B = pad_with_black(x, (48, 32), black=BLACK)
    assert torch.equal(again, padded)
    assert torch.equal(bag.pad_left_B, left_B)
    assert torch.equal(bag.pad_top_B, top_B)


def test_in_image_mode_the_padded_image_is_the_one_tile():
    x = random_images(2, 1, 100, 60)
    config = BagConfig(instances="image", pad_multiple_px=64)
    bag = make_bag(x, config, in_channels=1, black=BLACK)
    assert bag.tiles_BNCPP.shape == (2, 1, 1, 128, 64)
    assert bag.origin_N2.tolist() == [[0, 0]]
    assert bag.padded_hw == (128, 64) == tile_hw(bag.padded_hw, config)
    assert torch.equal(bag.tiles_BNCPP[:, 0], pad_with_black(x, (128, 64), black=BLACK)[0])


@pytest.mark.parametrize("config", [tiles_config(32), BagConfig(instances="image", pad_multiple_px=32)])
def test_three_channels_repeat_the_grey_one_without_a_copy(config):
    bag = make_bag(random_images(2, 1, 50, 40), config, in_channels=3, black=BLACK)
    grey, *others = bag.tiles_BNCPP.unbind(2)
    assert len(others) == 2
    assert all(torch.equal(grey, other) for other in others)
    assert bag.tiles_BNCPP.stride(2) == 0


@pytest.mark.parametrize(
    ("side", "overlap", "count"),
    [(256, 0.0, 24), (128, 0.0, 96), (384, 0.0, 12), (256, 0.75, 384), (128, 0.75, 1536), (384, 0.75, 176)],
)
def test_windows_of_the_published_counts(side, overlap, count):
    origins = window_origins((1536, 1024), side, overlap).tolist()
    assert len(origins) == count
    assert origins == sorted(origins, key=lambda corner: (corner[1], corner[0]))
    assert all(x < 1024 and y < 1536 for x, y in origins)


@given(
    side=st.sampled_from([5, 8, 12, 40]),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
)
@settings(max_examples=60, deadline=None)
def test_every_window_holds_the_pixels_at_its_origin_and_black_outside(side, overlap, height, width):
    config, x = tiles_config(16, overlap), random_images(2, 1, height, width)
    bag = make_bag(x, config, in_channels=3, black=BLACK, sizes=side)
    assert bag.padded_hw == (-(-height // 16) * 16, -(-width // 16) * 16)
    padded, *_ = pad_with_black(x, bag.padded_hw, black=BLACK)
    canvas = torch.nn.functional.pad(padded, (0, side, 0, side), value=BLACK)
    covered = torch.zeros(bag.padded_hw, dtype=torch.bool)
    assert bag.tiles_BNCPP.shape == (2, len(bag.origin_N2), 3, side, side)
    for n, (x0, y0) in enumerate(bag.origin_N2.tolist()):
        assert torch.equal(bag.tiles_BNCPP[:, n, :1], canvas[:, :, y0 : y0 + side, x0 : x0 + side])
        covered[y0 : y0 + side, x0 : x0 + side] = True
    assert covered.all()


def test_tiles_of_several_sizes_are_the_tiles_of_each():
    x, config = random_images(2, 1, 50, 40), tiles_config(32, 0.5)
    bag = make_bag(x, config, in_channels=1, black=BLACK, sizes=(8, 20))
    assert list(bag.tiles_BNCPP) == [8, 20]
    for side in (8, 20):
        alone = make_bag(x, config, in_channels=1, black=BLACK, sizes=side)
        for mine, other in zip(bag.of_scale(side), alone.of_scale(side), strict=True):
            assert torch.equal(mine, other)
