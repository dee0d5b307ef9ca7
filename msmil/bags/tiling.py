"""Padding with black and cutting into tiles, on the device, without a loop over images or tiles.

Tiles of the bags' own size (`bags.tile_size_px`) lie fully inside the padded image. Tiles that are instances themselves
(`sizes`: one size, or several for msp) start everywhere on their grid, and what leaves the image is black.

B bags, H W pixels, N tiles, C channels, P tile side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from msmil.config import BagConfig
from msmil.types import Bag


def padded_size(height_px: int, width_px: int, config: BagConfig) -> tuple[int, int]:
    """Height and width after padding: the next multiple of the tile side, or of `pad_multiple_px` in image mode.

    A side that is a multiple already stays. With `padding: legacy` it gets one more, as in the published code:
    n + (P - n % P).
    """
    multiple = config.tile_size_px if config.instances == "tiles" else config.pad_multiple_px
    if config.padding == "legacy":
        height_px, width_px = height_px + 1, width_px + 1
    return -(-height_px // multiple) * multiple, -(-width_px // multiple) * multiple


def tile_hw(padded_hw: tuple[int, int], config: BagConfig) -> tuple[int, int]:
    """Height and width of one tile; in image mode the padded image is the one tile."""
    return (config.tile_size_px, config.tile_size_px) if config.instances == "tiles" else padded_hw


def tile_origins(padded_hw: tuple[int, int], config: BagConfig) -> Tensor:
    """(x, y) of every tile's corner in the padded image, int64 [N, 2], sorted by y, then x.

    Tiles lie fully inside and step by P - int(P * overlap) (method of Mourao et al., MICCAI 2025).
    """
    (tile_height, tile_width), step = tile_hw(padded_hw, config), _step(config)
    y_Y = torch.arange(0, padded_hw[0] - tile_height + 1, step)
    x_X = torch.arange(0, padded_hw[1] - tile_width + 1, step)
    grid_y_YX, grid_x_YX = torch.meshgrid(y_Y, x_X, indexing="ij")
    return torch.stack([grid_x_YX.flatten(), grid_y_YX.flatten()], dim=1)


def window_origins(padded_hw: tuple[int, int], side_px: int, overlap: float) -> Tensor:
    """(x, y) of the corner of every tile of a size, int64 [N, 2], sorted by y, then x.

    They start at 0, step, 2 step.. as long as the corner is inside, with step = P - int(P * overlap); the last may
    leave the image (method of Mourao et al., MICCAI 2025, single-scale and multi-scale patches).
    """
    step = _step_px(side_px, overlap)
    y_Y, x_X = torch.arange(0, padded_hw[0], step), torch.arange(0, padded_hw[1], step)
    grid_y_YX, grid_x_YX = torch.meshgrid(y_Y, x_X, indexing="ij")
    return torch.stack([grid_x_YX.flatten(), grid_y_YX.flatten()], dim=1)


def make_bag(
    x_B1HW: Tensor,
    config: BagConfig,
    *,
    in_channels: int,
    black: float,
    sizes: int | tuple[int, ...] | None = None,
) -> Bag:
    """Pad standardised float32 images with `black` and cut them as `config` says.

    Args:
        sizes: tile sizes in pixels where an instance is a tile; several give a bag of tiles by size.

    Three channels are the one grey channel expanded, not copied.
    """
    padded_hw = padded_size(x_B1HW.shape[2], x_B1HW.shape[3], config)
    padded_B1HW, pad_left_B, pad_top_B = pad_with_black(x_B1HW, padded_hw, black=black)
    tiles: Tensor | dict[int, Tensor]
    origin: Tensor | dict[int, Tensor]

    def cut(side_px: int) -> tuple[Tensor, Tensor]:
        tiles_BN1PP = _windows(padded_B1HW, side_px, config.tile_overlap, black=black)
        origin_N2 = window_origins(padded_hw, side_px, config.tile_overlap).to(x_B1HW.device)
        return tiles_BN1PP.expand(-1, -1, in_channels, -1, -1), origin_N2

    if isinstance(sizes, tuple):
        cuts = {side_px: cut(side_px) for side_px in sizes}
        tiles, origin = {s: part for s, (part, _) in cuts.items()}, {s: at for s, (_, at) in cuts.items()}
    elif sizes is not None:
        tiles, origin = cut(sizes)
    else:
        if config.instances == "tiles":
            tiles_BN1PP = _unfold(padded_B1HW, config.tile_size_px, _step(config))
        else:
            tiles_BN1PP = padded_B1HW.unsqueeze(1)
        tiles = tiles_BN1PP.expand(-1, -1, in_channels, -1, -1)
        origin = tile_origins(padded_hw, config).to(x_B1HW.device)
    return Bag(tiles, origin, pad_left_B, pad_top_B, padded_hw)


def _windows(padded_B1HW: Tensor, side_px: int, overlap: float, *, black: float) -> Tensor:
    """Every tile of a size, with black where it leaves the image: [B, N, 1, P, P]."""
    step = _step_px(side_px, overlap)
    over = [(-(-length // step) - 1) * step + side_px - length for length in padded_B1HW.shape[2:]]
    padded_B1HW = F.pad(padded_B1HW, (0, max(0, over[1]), 0, max(0, over[0])), value=black)
    return _unfold(padded_B1HW, side_px, step)


def _unfold(image_B1HW: Tensor, side_px: int, step: int) -> Tensor:
    return image_B1HW[:, 0].unfold(1, side_px, step).unfold(2, side_px, step).flatten(1, 2).unsqueeze(2)


def pad_with_black(x_B1HW: Tensor, padded_hw: tuple[int, int], *, black: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images in a canvas of `padded_hw`, and the int64 pixels put left of and above each of them.

    All of a side's padding goes where the image has less tissue: to the left if the left half's sum is the smaller
    one, else to the right; to the top likewise; halves split at n // 2 (method of Mourao et al., MICCAI 2025).
    """
    height, width = x_B1HW.shape[2:]
    more_y, more_x = padded_hw[0] - height, padded_hw[1] - width
    # In float64, so that the order of summation does not decide between halves that are nearly equal.
    left_B = _first_half_smaller(x_B1HW.sum(dim=(1, 2), dtype=torch.float64))
    top_B = _first_half_smaller(x_B1HW.sum(dim=(1, 3), dtype=torch.float64))
    if more_x or more_y:
        x_B1HW = F.pad(x_B1HW, (0, more_x, 0, more_y), value=black)
    # Rolling brings the black from the end to the front.
    if more_x:
        x_B1HW = torch.where(left_B[:, None, None, None], x_B1HW.roll(more_x, dims=3), x_B1HW)
    if more_y:
        x_B1HW = torch.where(top_B[:, None, None, None], x_B1HW.roll(more_y, dims=2), x_B1HW)
    return x_B1HW, left_B.to(torch.int64) * more_x, top_B.to(torch.int64) * more_y


def _first_half_smaller(profile_BL: Tensor) -> Tensor:
    middle = profile_BL.shape[1] // 2
    return profile_BL[:, :middle].sum(dim=1) < profile_BL[:, middle:].sum(dim=1)


def _step(config: BagConfig) -> int:
    return _step_px(config.tile_size_px, config.tile_overlap)


def _step_px(side_px: int, overlap: float) -> int:
    return side_px - int(side_px * overlap)
