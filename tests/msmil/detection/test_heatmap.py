"""Maps in stored pixels: an instance's value lands on the instance's pixels, whatever the padding and the tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmil.bags.tiling import make_bag
from msmil.config import BagConfig
from msmil.detection.heatmap import fill_squares, instance_weights, map_names, maps, normalise, stitch, to_image
from msmil.types import Bag, BagOutput
from shards.errors import UserError

CENTRED = dict.fromkeys((2, 4, 8, 16), (0.0, 0.0))


def bag_of(*, stored_hw, config, pads):
    """A bag made the way the training does; the tissue decides on which side the padding goes."""
    image = torch.zeros(len(pads), 1, *stored_hw)
    for b, (left, top) in enumerate(pads):
        rows = slice(stored_hw[0] // 2, None) if top else slice(0, stored_hw[0] // 2)
        columns = slice(stored_hw[1] // 2, None) if left else slice(0, stored_hw[1] // 2)
        image[b, 0, rows, columns] = 1.0
    return make_bag(image, config, in_channels=1, black=0.0)


def cell_of(bag, stride, instance):
    """First pixel (y, x) of an instance's cell in the padded image, computed the long way."""
    rows, columns = (side // stride for side in bag.tiles_BNCPP.shape[-2:])
    tile, rest = divmod(instance, rows * columns)
    y, x = divmod(rest, columns)
    corner_x, corner_y = bag.origin_N2[tile].tolist()
    return corner_y + y * stride, corner_x + x * stride


def output_with(values, *, kind="attention", weight=None):
    some = next(iter(values.values()))
    logit = torch.zeros(some.shape[:2])
    fields = {"attention": None, "instance_logit": None} | {kind: values}
    return BagOutput(logit, None, score=None, scale_weight_BKS=weight, **fields)


@st.composite
def planted(draw):
    """A bag of two images with paddings of their own, and one instance of it."""
    stride = draw(st.sampled_from([4, 8, 16]))
    tiles = draw(st.booleans())
    overlap = draw(st.sampled_from([0.0, 0.5, 0.75])) if tiles else 0.0
    config = BagConfig(
        instances="tiles" if tiles else "image", tile_size_px=64, tile_overlap=overlap, pad_multiple_px=32
    )
    stored_hw = draw(st.tuples(st.integers(33, 100), st.integers(33, 100)))
    pads = draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=2))
    bag = bag_of(stored_hw=stored_hw, config=config, pads=pads)
    per_tile = (bag.tiles_BNCPP.shape[-2] // stride) * (bag.tiles_BNCPP.shape[-1] // stride)
    instance = draw(st.integers(0, len(bag.origin_N2) * per_tile - 1))
    return bag, stride, instance, stored_hw, per_tile * len(bag.origin_N2)


@settings(max_examples=150, deadline=None)
@given(planted())
def test_the_peak_of_a_map_lies_in_the_cell_of_the_instance_it_was_planted_at(case):
    bag, stride, instance, stored_hw, count = case
    value_BKI = torch.zeros(2, 1, count)
    value_BKI[:, :, instance] = 1.0
    map_BKHW = maps(
        output_with({stride: value_BKI}), bag, torch.ones(2, *stored_hw, dtype=torch.bool), CENTRED
    ).attention[stride]
    assert map_BKHW.shape == (2, 1, *stored_hw)
    first_y, first_x = cell_of(bag, stride, instance)
    for b in range(2):
        y0 = max(first_y - int(bag.pad_top_B[b]), 0)
        y1 = min(first_y + stride - int(bag.pad_top_B[b]), stored_hw[0])
        x0 = max(first_x - int(bag.pad_left_B[b]), 0)
        x1 = min(first_x + stride - int(bag.pad_left_B[b]), stored_hw[1])
        if y0 >= y1 or x0 >= x1:  # the cell lies in the padding
            continue
        peak_y, peak_x = divmod(int(map_BKHW[b, 0].argmax()), stored_hw[1])
        assert y0 <= peak_y < y1
        assert x0 <= peak_x < x1


@pytest.mark.parametrize("pads", [[(False, False)], [(True, False)], [(False, True)], [(True, True)]])
def test_padding_on_every_side_is_cut_off(pads):
    bag = bag_of(stored_hw=(40, 50), config=BagConfig(pad_multiple_px=32), pads=pads)
    (left, top) = pads[0]
    assert (int(bag.pad_left_B), int(bag.pad_top_B)) == (14 * left, 24 * top)
    padded = torch.arange(64 * 64, dtype=torch.float32).reshape(1, 1, 64, 64)
    found = to_image(padded, padded_hw=(64, 64), pad_left_B=bag.pad_left_B, pad_top_B=bag.pad_top_B, image_hw=(40, 50))
    expected = padded[..., 24 * top : 24 * top + 40, 14 * left : 14 * left + 50]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_value_belongs_to_the_centre_of_its_cell(stride):
    """A plane that is linear in x and y is linear in pixels: a shift by half a pixel would show."""
    h, w = 6, 5
    cell_y, cell_x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centre = ((cell_x + 0.5) * stride + 10 * (cell_y + 0.5) * stride).float()[None, None]
    zero = torch.zeros(1, dtype=torch.int64)
    size = (h * stride, w * stride)
    found = to_image(centre, padded_hw=size, pad_left_B=zero, pad_top_B=zero, image_hw=size)[0, 0]
    pixel_y, pixel_x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    inner = slice(stride // 2, -stride // 2)
    torch.testing.assert_close(found[inner, inner], (pixel_x + 10 * pixel_y)[inner, inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize("offset_yx", [(0.0, 0.0), (-3.5, 2.5), (-7.5, -7.5)])
def test_a_value_appears_where_its_cell_really_looks(offset_yx):
    """As above, with the plane's values taken at the true centres: on every pixel between these it is the plane."""
    h, w, stride, pad_left, pad_top = 7, 8, 8, 5, 3
    (dy, dx), size = offset_yx, (h * stride, w * stride)
    cell_y, cell_x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    seen = (cell_x * stride + dx + 10 * (cell_y * stride + dy))[None, None]
    image_hw = (size[0] - pad_top, size[1] - pad_left)
    pads = {"pad_left_B": torch.tensor([pad_left]), "pad_top_B": torch.tensor([pad_top])}
    found = to_image(seen, padded_hw=size, **pads, image_hw=image_hw, offset_yx=offset_yx)[0, 0]
    y, x = torch.meshgrid(torch.arange(image_hw[0]) + 0.5, torch.arange(image_hw[1]) + 0.5, indexing="ij")
    inner = slice(stride, -2 * stride)
    torch.testing.assert_close(
        found[inner, inner], (x + pad_left + 10 * (y + pad_top))[inner, inner], rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("spot", [(40.0, 72.0), (57.0, 50.0)])
def test_a_bright_spot_is_found_by_cells_that_look_at_their_upper_left(stride, spot):
    """Cells respond to the distance of the spot from i s + 0.5; the peak lies within half a stride of the spot."""
    cell = torch.arange(128 // stride) * stride + 0.5
    distance = (cell[:, None] - spot[0]) ** 2 + (cell[None, :] - spot[1]) ** 2
    value_BKI = torch.exp(-distance / (2 * stride**2)).flatten()[None, None]
    offsets = {stride: (-(stride - 1) / 2, -(stride - 1) / 2)}
    breast_BHW = torch.ones(1, 128, 128, dtype=torch.bool)
    for kind in ("attention", "instance_logit"):
        found = maps(output_with({stride: value_BKI}, kind=kind), whole_image_bag(1, 128, 128), breast_BHW, offsets)
        for map_BKHW in found.named().values():
            y, x = divmod(int(map_BKHW[0, 0].argmax()), 128)
            assert abs(y + 0.5 - spot[0]) <= stride / 2
            assert abs(x + 0.5 - spot[1]) <= stride / 2


def test_tiles_that_overlap_are_averaged():
    origin_N2 = torch.tensor([[0, 0], [4, 0]])
    value_BKI = torch.cat([torch.full((1, 1, 4), 1.0), torch.full((1, 1, 4), 3.0)], dim=2)
    found = stitch(value_BKI, origin_N2=origin_N2, tile_hw=(8, 8), stride=4, padded_hw=(8, 12))
    assert found[0, 0].tolist() == [[1, 2, 3], [1, 2, 3]]


def test_a_corner_between_cells_shares_its_values_out_to_both_sides_alike():
    """Tiles at x = 0, 6 and 12 with stride 4: the middle one's cells lie half on one cell and half on the next."""
    origin_N2 = torch.tensor([[0, 0], [6, 0], [12, 0]])
    centre_I = torch.tensor([[2.0, 6, 2, 6], [8, 12, 8, 12], [14, 18, 14, 18]])
    found = stitch(centre_I.reshape(1, 1, 12), origin_N2=origin_N2, tile_hw=(8, 8), stride=4, padded_hw=(8, 20))
    expected = torch.tensor([2.0, (6 + 8 / 2) / 1.5, (8 + 12) / 2, (12 / 2 + 14) / 1.5, 18]).expand(2, 5)
    torch.testing.assert_close(found[0, 0], expected)


def test_cells_that_no_tile_covers_get_the_lowest_value():
    value_BKI = torch.tensor([[[2.0, 3, 4, 5]]])
    found = stitch(
        value_BKI, origin_N2=torch.zeros(1, 2, dtype=torch.int64), tile_hw=(8, 8), stride=4, padded_hw=(8, 12)
    )
    assert found[0, 0].tolist() == [[2, 3, 2], [4, 5, 2]]


def whole_image_bag(batch, height, width):
    zero = torch.zeros(batch, dtype=torch.int64)
    return Bag(
        torch.zeros(batch, 1, 1, height, width), torch.zeros(1, 2, dtype=torch.int64), zero, zero, (height, width)
    )


def test_normalise_stretches_over_the_breast_alone():
    map_BKHW = torch.tensor([[[[9.0, 2.0], [4.0, 6.0]]], [[[9.0, 5.0], [5.0, 5.0]]]])
    breast_BHW = torch.tensor([[[False, True], [True, True]]] * 2)
    assert normalise(map_BKHW, breast_BHW).tolist() == [[[[0, 0], [0.5, 1]]], [[[0, 0], [0, 0]]]]


def test_merged_follows_its_formula():
    torch.manual_seed(0)
    bag, breast_BHW = whole_image_bag(2, 32, 24), torch.rand(2, 32, 24) > 0.3
    attention = {8: torch.rand(2, 3, 12), 4: torch.rand(2, 3, 48)}
    logit = {8: torch.randn(2, 3, 12), 4: torch.randn(2, 3, 48)}
    weight_BKS = torch.rand(2, 3, 2).softmax(2)
    output = BagOutput(torch.zeros(2, 3), None, attention, None, logit, weight_BKS)
    found = maps(output, bag, breast_BHW, CENTRED)
    for b in range(2):
        for k in range(3):
            expected = np.zeros((32, 24))
            inside = breast_BHW[b].numpy()
            for s, stride in enumerate((8, 4)):
                probability = 1 / (1 + np.exp(-found.instance[stride][b, k].double().numpy()))
                for kind in (found.attention[stride][b, k].double().numpy(), probability):
                    unit = (kind - kind[inside].min()) / (kind[inside].max() - kind[inside].min())
                    expected += float(weight_BKS[b, k, s]) / 2 * np.where(inside, unit, 0)
            np.testing.assert_allclose(found.merged_BKHW[b, k].numpy(), expected, atol=1e-5)
    assert float(found.merged_BKHW.max()) <= 1 + 1e-6


def test_a_lesion_on_which_both_kinds_agree_beats_one_that_attention_alone_prefers():
    bag, breast_BHW = whole_image_bag(1, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
    attention_I, logit_I = torch.full((16,), 0.01), torch.full((16,), -4.0)
    attention_I[0], logit_I[0] = 0.5, -3.0  # attention's favourite, where the head sees nothing
    attention_I[10], logit_I[10] = 0.3, 3.0
    output = BagOutput(torch.zeros(1, 1), None, {8: attention_I[None, None]}, None, {8: logit_I[None, None]}, None)
    found = maps(output, bag, breast_BHW, CENTRED)
    assert divmod(int(found.attention[8].argmax()), 32) < (8, 0)
    y, x = divmod(int(found.merged_BKHW.argmax()), 32)
    assert (y // 8, x // 8) == divmod(10, 4)


@pytest.mark.parametrize(("kind", "names"), [("attention", ["attention_8"]), ("instance_logit", ["instance_8"])])
def test_one_kind_of_map_is_enough(kind, names):
    bag, breast_BHW = whole_image_bag(1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    found = maps(output_with({8: torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])}, kind=kind), bag, breast_BHW, CENTRED).named()
    wanted = map_names([8], attention=kind == "attention", instance=kind == "instance_logit")
    assert list(found) == wanted == ["merged", *names]
    assert int(found["merged"].argmax()) == int(found[names[0]].argmax())
    assert float(found["merged"].max()) == 1


def test_neither_kind_is_the_users_error():
    bag, breast_BHW = whole_image_bag(1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    with pytest.raises(UserError, match="neither attention nor instance logits"):
        maps(BagOutput(torch.zeros(1, 1), None, None, None, None, None), bag, breast_BHW, CENTRED)


def test_half_precision_comes_out_as_float32():
    bag, breast_BHW = whole_image_bag(1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    values = {8: torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.bfloat16)}
    found = maps(output_with(values, weight=torch.ones(1, 1, 1, dtype=torch.bfloat16)), bag, breast_BHW, CENTRED)
    assert {map_BKHW.dtype for map_BKHW in found.named().values()} == {torch.float32}


@settings(max_examples=40, deadline=None)
@given(
    side=st.sampled_from([4, 6, 10]),
    overlap=st.sampled_from([0.0, 0.5, 0.75]),
    stored_hw=st.tuples(st.integers(9, 30), st.integers(9, 30)),
    pads=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=2),
    several=st.booleans(),
)
def test_a_tile_with_one_value_fills_its_square(side, overlap, stored_hw, pads, several):
    """Where tiles overlap their mean; on each image's own pixels, whatever its padding."""
    config = BagConfig(instances="tiles", tile_size_px=8, tile_overlap=overlap)
    image = bag_of(stored_hw=stored_hw, config=config, pads=pads).tiles_BNCPP.new_zeros(2, 1, *stored_hw)
    for b, (left, top) in enumerate(pads):
        image[b, 0, stored_hw[0] // 2 if top else 0, stored_hw[1] // 2 if left else 0] = 1.0
    bag = make_bag(image, config, in_channels=1, black=0.0, sizes=(side, 2 * side) if several else side)
    origins = bag.of_scale(side)[1].tolist()
    value_BKN = torch.rand(2, 3, len(origins), generator=torch.Generator().manual_seed(0))
    found = maps(
        output_with({side: value_BKN}),
        bag,
        torch.ones(2, *stored_hw, dtype=torch.bool),
        {side: (0.0, 0.0)},
    ).attention[side]
    for b in range(2):
        for y, x in ((0, 0), (stored_hw[0] - 1, 2), (stored_hw[0] // 2, stored_hw[1] - 1)):
            py, px = y + int(bag.pad_top_B[b]), x + int(bag.pad_left_B[b])
            over = [n for n, (x0, y0) in enumerate(origins) if x0 <= px < x0 + side and y0 <= py < y0 + side]
            torch.testing.assert_close(found[b, :, y, x], value_BKN[b, :, over].mean(1), atol=1e-6, rtol=0)


def test_pixels_outside_all_squares_get_the_lowest_value():
    map_BKHW = fill_squares(
        torch.tensor([[[3.0, 5.0]]]), origin_N2=torch.tensor([[0, 0], [4, 0]]), tile_hw=(4, 4), padded_hw=(6, 10)
    )
    assert map_BKHW[0, 0, 2].tolist() == [3.0] * 4 + [5.0] * 4 + [3.0] * 2
    assert (map_BKHW[0, 0, 4:] == 3.0).all()


def test_nested_weights_are_the_pixel_s_times_the_region_s():
    inner_BKNI = torch.rand(1, 2, 3, 4).softmax(-1)
    region_BKN = torch.rand(1, 2, 3).softmax(-1)
    both = BagOutput(torch.zeros(1, 2), None, {8: region_BKN}, None, None, None, inner_attention={8: inner_BKNI})
    weight_BKI = instance_weights(both)[8]
    for n in range(3):
        torch.testing.assert_close(weight_BKI[:, :, 4 * n : 4 * n + 4], inner_BKNI[:, :, n] * region_BKN[:, :, n, None])
    torch.testing.assert_close(weight_BKI.sum(-1), torch.ones(1, 2))
    alone = BagOutput(torch.zeros(1, 2), None, None, None, None, None, inner_attention={8: inner_BKNI})
    torch.testing.assert_close(instance_weights(alone)[8], inner_BKNI.flatten(2) / 3)
