"""From what a model returns to maps in the pixels of the stored image.

B bags (images), K labels, I instances of one scale, N tiles, S scales, H W pixels of the stored image, h w cells of a
scale (one cell is stride x stride pixels of the padded image).

A cell's value belongs to the point that the cell looks at: (i + 0.5) * stride + d for cell i, where the offset d is
the network's (`msmil.models.centres`). Pixel y of the padded image, whose centre is y + 0.5, then lies at
(y + 0.5 - d) / stride - 0.5 on the grid of cells.

Where a tile has one value (a scale is a tile size, or regions have weights and their instances have none), it fills the
tile's square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from msmil.types import Bag, BagOutput
from shards.errors import UserError

MERGED: Final = "merged"


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps of a batch in stored pixels, float32 [B, K, H, W].

    attention: {scale: weight of the instance at that pixel (nested: times its region's)}; instance: {scale: logit of
    the scale's head on that instance}, empty where the model was not asked for it; merged_BKHW: 0..1, 0 outside the
    breast (see `maps`). A scale is a stride or a tile size.
    """

    attention: dict[int, Tensor]
    instance: dict[int, Tensor]
    merged_BKHW: Tensor

    def named(self) -> dict[str, Tensor]:
        """All maps by name: merged, attention_<stride>, instance_<stride>."""
        by_name = {MERGED: self.merged_BKHW}
        by_name |= {f"attention_{stride}": map_BKHW for stride, map_BKHW in self.attention.items()}
        return by_name | {f"instance_{stride}": map_BKHW for stride, map_BKHW in self.instance.items()}


def map_names(scales: Iterable[int], *, attention: bool = True, instance: bool = True) -> list[str]:
    """The names that `Maps.named` will have, in its order."""
    strides = list(scales)
    names = [MERGED]
    names += [f"attention_{stride}" for stride in strides if attention]
    return names + [f"instance_{stride}" for stride in strides if instance]


@torch.no_grad()
def maps(output: BagOutput, bag: Bag, breast_BHW: Tensor, offsets: Mapping[int, tuple[float, float]]) -> Maps:
    """Maps of every scale and label, and their merger.

    Args:
        output: of the model on `bag`, with attention, instance logits, or both; its scale weights in their order.
        bag: the bags, with the padding and the tiles' corners.
        breast_BHW: bool, the breast in the stored images (`breast_masks`), on the same device; not empty.
        offsets: (dy, dx) in pixels of a cell's true centre from (i + 0.5) * stride, for every stride.

    merged = sum_s v_s * mean over kinds of u(map_s), with
        u(x) = (x - min) / (max - min), minimum and maximum over the breast of that image, 0 where they are equal;
        kinds: the attention, and sigmoid(instance logit), whichever there is;
        v_s: the weight that the model gave to scale s for that image and label, or 1 / S where it gives none.
    Attention says where a scale looked, the instance logit what it saw there; attention alone may settle beside a
    lesion, or on one of several. A map is made finer by bilinear interpolation before it is normalised, so a coarse
    scale adds a smooth hill. Outside the breast merged is 0.

    Raises UserError where the output holds neither attention nor instance logits.
    """
    if not output.attention and not output.inner_attention and not output.instance_logit:
        fix = "use a pooling with attention, or ask the model for instance logits"
        raise UserError("the model returned neither attention nor instance logits: there is no map", fix=fix)
    attention, instance = (
        {
            stride: _in_image(value_BKI, stride, bag, breast_BHW, offsets[stride])
            for stride, value_BKI in by_stride.items()
        }
        for by_stride in (instance_weights(output), output.instance_logit or {})
    )
    strides = list(attention or instance)
    weight_BKS = output.scale_weight_BKS
    if weight_BKS is None:
        weight_BKS = torch.full((*output.logit_BK.shape, len(strides)), 1 / len(strides), device=breast_BHW.device)
    merged_BKHW = torch.zeros((*output.logit_BK.shape, *breast_BHW.shape[1:]), device=breast_BHW.device)
    kinds = int(bool(attention)) + int(bool(instance))
    for s, stride in enumerate(strides):
        share_BK11 = weight_BKS[:, :, s, None, None].float() / kinds
        if attention:
            merged_BKHW += share_BK11 * normalise(attention[stride], breast_BHW)
        if instance:
            merged_BKHW += share_BK11 * normalise(instance[stride].sigmoid(), breast_BHW)
    return Maps(attention, instance, merged_BKHW)


def instance_weights(output: BagOutput) -> dict[int, Tensor]:
    """{scale: weight_BKI}, empty without attention.

    Nested: an instance's weight in its region times the region's (FPN-MIL, nested maps); where only one of the two
    levels has attention, it alone tells.
    """
    regions, inner = output.attention or {}, output.inner_attention
    if inner is None:
        return regions
    if not regions:
        return {scale: weight_BKNI.flatten(2) / weight_BKNI.shape[2] for scale, weight_BKNI in inner.items()}
    return {scale: (weight_BKNI * regions[scale][..., None]).flatten(2) for scale, weight_BKNI in inner.items()}


def _in_image(value_BKI: Tensor, stride: int, bag: Bag, breast_BHW: Tensor, offset_yx: tuple[float, float]) -> Tensor:
    tiles_BNCPP, origin_N2 = bag.of_scale(stride)
    tile_hw = (tiles_BNCPP.shape[-2], tiles_BNCPP.shape[-1])
    if value_BKI.shape[2] == len(origin_N2):
        square_BKHW = fill_squares(value_BKI, origin_N2=origin_N2, tile_hw=tile_hw, padded_hw=bag.padded_hw)
        return _cut_padding(square_BKHW, bag, (breast_BHW.shape[1], breast_BHW.shape[2]))
    map_BKhw = stitch(value_BKI, origin_N2=origin_N2, tile_hw=tile_hw, stride=stride, padded_hw=bag.padded_hw)
    return to_image(
        map_BKhw,
        padded_hw=bag.padded_hw,
        pad_left_B=bag.pad_left_B,
        pad_top_B=bag.pad_top_B,
        image_hw=(breast_BHW.shape[1], breast_BHW.shape[2]),
        offset_yx=offset_yx,
    )


def fill_squares(
    value_BKN: Tensor, *, origin_N2: Tensor, tile_hw: tuple[int, int], padded_hw: tuple[int, int]
) -> Tensor:
    """One value per tile on all of its pixels, float32 [B, K, padded H, padded W]; the mean where tiles overlap.

    A tile may leave the image. Pixels that no tile covers get the lowest value of their map. The sums over tiles come
    from the differences at the corners of their squares, without a loop.
    """
    height, width = padded_hw
    origin_N2 = origin_N2.to(value_BKN.device)
    x_N, y_N = origin_N2[:, 0], origin_N2[:, 1]
    right_N, below_N = (x_N + tile_hw[1]).clamp(max=width), (y_N + tile_hw[0]).clamp(max=height)
    ones_11N = value_BKN.new_ones((1, 1, len(origin_N2)), dtype=torch.float64)
    sums = []
    for exact in (value_BKN.double(), ones_11N):
        corner = exact.new_zeros((*exact.shape[:2], (height + 1) * (width + 1)))
        for sign, row_N, column_N in ((1, y_N, x_N), (-1, y_N, right_N), (-1, below_N, x_N), (1, below_N, right_N)):
            corner.index_add_(2, row_N * (width + 1) + column_N, sign * exact)
        sums.append(corner.unflatten(2, (height + 1, width + 1)).cumsum(2).cumsum(3)[:, :, :-1, :-1])
    total_BKHW, count_11HW = sums[0], sums[1].round()
    mean_BKHW = total_BKHW / count_11HW.clamp(min=1)
    return torch.where(count_11HW > 0, mean_BKHW, value_BKN.double().amin(2)[:, :, None, None]).float()


def _cut_padding(map_BKHW: Tensor, bag: Bag, image_hw: tuple[int, int]) -> Tensor:
    """The stored image's part of a map in pixels of the padded one."""
    device = map_BKHW.device
    y_BH = bag.pad_top_B.to(device)[:, None] + torch.arange(image_hw[0], device=device)
    x_BW = bag.pad_left_B.to(device)[:, None] + torch.arange(image_hw[1], device=device)
    b_B111, k_1K11 = (torch.arange(n, device=device) for n in map_BKHW.shape[:2])
    return map_BKHW[
        b_B111[:, None, None, None], k_1K11[None, :, None, None], y_BH[:, None, :, None], x_BW[:, None, None]
    ]


def stitch(
    value_BKI: Tensor, *, origin_N2: Tensor, tile_hw: tuple[int, int], stride: int, padded_hw: tuple[int, int]
) -> Tensor:
    """Lay the instances of one scale side by side: float32 [B, K, h, w], one cell per stride.

    Args:
        value_BKI: values of instances in the order (tile, y, x).
        origin_N2: (x, y) of each tile's corner in the padded image, in pixels.
        tile_hw: height and width of a tile; multiples of the stride, as is padded_hw.
        stride: pixels per cell.
        padded_hw: height and width of the padded image.

    Where tiles overlap, the mean is taken. A tile whose corner is no multiple of the stride shares its values out to
    the neighbouring cells by bilinear weights. Cells that no tile covers get the lowest value of their map.
    """
    rows, columns = tile_hw[0] // stride, tile_hw[1] // stride
    h, w = padded_hw[0] // stride, padded_hw[1] // stride
    assert tile_hw == (rows * stride, columns * stride), f"tile {tile_hw} is no multiple of stride {stride}"
    assert padded_hw == (h * stride, w * stride), f"padded image {padded_hw} is no multiple of stride {stride}"
    assert value_BKI.shape[2] == len(origin_N2) * rows * columns, "instances do not fill the tiles"
    value_BKI, origin_N2 = value_BKI.float(), origin_N2.to(value_BKI.device)
    corner_N2 = origin_N2 // stride
    share_N2 = (origin_N2 % stride).float() / stride
    y_N11 = corner_N2[:, 1, None, None] + torch.arange(rows, device=value_BKI.device)[None, :, None]
    x_N11 = corner_N2[:, 0, None, None] + torch.arange(columns, device=value_BKI.device)[None, None, :]
    total_BKc = value_BKI.new_zeros((*value_BKI.shape[:2], h * w))
    weight_c = value_BKI.new_zeros(h * w)
    for down in (0, 1):
        for right in (0, 1):
            share_y_N = share_N2[:, 1] if down else 1 - share_N2[:, 1]
            share_x_N = share_N2[:, 0] if right else 1 - share_N2[:, 0]
            inside_NIJ = (y_N11 + down < h) & (x_N11 + right < w)
            share_I = ((share_y_N * share_x_N)[:, None, None] * inside_NIJ).flatten()
            cell_I = ((y_N11 + down).clamp(max=h - 1) * w + (x_N11 + right).clamp(max=w - 1)).flatten()
            total_BKc.index_add_(2, cell_I, value_BKI * share_I)
            weight_c.index_add_(0, cell_I, share_I)
    mean_BKc = total_BKc / weight_c
    # No instance saw these cells: they are the last that a map may point to.
    mean_BKc = torch.where(weight_c > 0, mean_BKc, value_BKI.amin(dim=2, keepdim=True))
    return mean_BKc.reshape(*value_BKI.shape[:2], h, w)


def to_image(
    map_BKhw: Tensor,
    *,
    padded_hw: tuple[int, int],
    pad_left_B: Tensor,
    pad_top_B: Tensor,
    image_hw: tuple[int, int],
    offset_yx: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """A map of cells as float32 [B, K, H, W] in the pixels of the stored image: bilinear, each image's padding cut off.

    The value of cell i appears at (i + 0.5) * stride + offset, in pixels of the padded image along each axis.
    Between centres of cells the value is interpolated; outside the outermost centres it stays constant.
    """
    y_BH = _grid(pad_top_B, image_hw[0], padded_hw[0], offset_yx[0], map_BKhw.device)
    x_BW = _grid(pad_left_B, image_hw[1], padded_hw[1], offset_yx[1], map_BKhw.device)
    grid_BHW2 = torch.stack(
        [x_BW[:, None, :].expand(-1, image_hw[0], -1), y_BH[:, :, None].expand(-1, -1, image_hw[1])], dim=-1
    )
    return functional.grid_sample(
        map_BKhw.float(), grid_BHW2.float(), mode="bilinear", padding_mode="border", align_corners=False
    )


def _grid(pad_B: Tensor, length: int, padded: int, offset: float, device: torch.device) -> Tensor:
    """Centres of the image's pixels along one axis, float64 [B, length], where the shifted map spans -1..1."""
    pixel_L = torch.arange(length, device=device, dtype=torch.float64)
    return (pad_B.to(device)[:, None] + pixel_L + 0.5 - offset) * (2 / padded) - 1


def normalise(map_BKHW: Tensor, breast_BHW: Tensor) -> Tensor:
    """Stretch each map to 0..1 over its breast; 0 outside, and everywhere where a map is constant."""
    inside_B1HW = breast_BHW[:, None]
    low_BK11 = map_BKHW.masked_fill(~inside_B1HW, torch.inf).amin(dim=(2, 3), keepdim=True)
    high_BK11 = map_BKHW.masked_fill(~inside_B1HW, -torch.inf).amax(dim=(2, 3), keepdim=True)
    range_BK11 = high_BK11 - low_BK11
    scaled_BKHW = (map_BKHW - low_BK11) / torch.where(range_BK11 > 0, range_BK11, 1.0)
    return scaled_BKHW.masked_fill(~inside_B1HW, 0.0)
