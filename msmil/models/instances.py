"""From tiles to the instances of each scale.

Legend: B bags, N tiles, M tiles of all bags, C channels, P tile side, I instances of a tile, D channels, h w size of a
map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from msmil.models.backbone import Backbone
from msmil.models.pyramid import FeaturePyramid
from shards.errors import UserError

Tiles = Tensor | Mapping[int, Tensor]
"""Tiles [B, N, C, P, P], or {tile size in px: tiles} where there are tiles of several sizes."""
TileMask = Tensor | Mapping[int, Tensor]
"""True for real tiles [B, N], or the same by tile size."""


class Instances(NamedTuple):
    """Instances of one scale by tile, row-major within it; zeros for those of padded tiles (mask_BN False)."""

    x_BNID: Tensor
    mask_BN: Tensor | None

    def bags(self) -> tuple[Tensor, Tensor | None]:
        """Instances of the whole bag in the order (tile, y, x), and their mask."""
        mask_BN = self.mask_BN
        per_tile = self.x_BNID.shape[2]
        return self.x_BNID.flatten(1, 2), None if mask_BN is None else mask_BN.repeat_interleave(per_tile, dim=1)


def pyramid_instances(
    backbone: Backbone, pyramid: FeaturePyramid, tiles_BNCPP: Tensor, mask_BN: Tensor | None
) -> dict[int, Instances]:
    """{stride: the cells of its map}. Padded tiles are not encoded."""
    levels = pyramid(backbone(_real_tiles(tiles_BNCPP, mask_BN)))
    return {
        scale: _instances(map_MDhw.permute(0, 2, 3, 1).flatten(1, 2), tiles_BNCPP, mask_BN)
        for scale, map_MDhw in levels.items()
    }


def pooled_instances(backbone: Backbone, tiles_BNCPP: Tensor, mask_BN: Tensor | None) -> Instances:
    """One instance per tile: the mean over the backbone's last map (FPN-MIL, single-scale and multi-scale patches)."""
    map_MDhw = backbone(_real_tiles(tiles_BNCPP, mask_BN))[-1]
    return _instances(map_MDhw.mean((2, 3))[:, None], tiles_BNCPP, mask_BN)


def _real_tiles(tiles_BNCPP: Tensor, mask_BN: Tensor | None) -> Tensor:
    tiles_MCPP = tiles_BNCPP.flatten(0, 1)
    return tiles_MCPP if mask_BN is None else tiles_MCPP[mask_BN.flatten()]


def _instances(x_MID: Tensor, tiles_BNCPP: Tensor, mask_BN: Tensor | None) -> Instances:
    bags, tiles = tiles_BNCPP.shape[:2]
    if mask_BN is not None:
        every_MID = x_MID.new_zeros(bags * tiles, *x_MID.shape[1:])
        every_MID[mask_BN.flatten()] = x_MID
        x_MID = every_MID
    return Instances(x_MID.unflatten(0, (bags, tiles)), mask_BN)


def check_tiles(tiles: Tiles, mask: TileMask | None, *, in_channels: int, sizes: tuple[int, ...] | None) -> None:
    """Refuse what a model cannot be called on.

    Args:
        tiles: as the model was given them.
        mask: likewise.
        in_channels: channels of a tile.
        sizes: tile sizes in px that a model of several wants, None for the others.

    Raises:
        UserError: wrong shape or keys, a mask that does not fit, a bag without a real tile.
    """
    if sizes is None:
        if not isinstance(tiles, Tensor) or not (mask is None or isinstance(mask, Tensor)):
            fix = "give one tensor [bags, tiles, channels, height, width], and one mask"
            raise UserError("the model was called on tiles by size, but it has tiles of one size", fix=fix)
        _check_size(tiles, mask, in_channels)
        return
    fix = f"give {{tile size: [bags, tiles, {in_channels}, height, width]}} for the tile sizes {list(sizes)}"
    if isinstance(tiles, Tensor) or set(tiles) != set(sizes):
        given = "one tensor" if isinstance(tiles, Tensor) else f"tiles of the sizes {list(tiles)}"
        raise UserError(f"the model was called on {given}", fix=fix)
    if isinstance(mask, Tensor) or (mask is not None and set(mask) != set(sizes)):
        raise UserError("the mask does not go with the tiles", fix=f"give {{tile size: mask}} for {list(sizes)}")
    for size in sizes:
        _check_size(tiles[size], None if mask is None else mask[size], in_channels)
    if len({len(tiles[size]) for size in sizes}) > 1:
        raise UserError(f"the tile sizes have {[len(tiles[s]) for s in sizes]} bags", fix="give every bag in each size")


def _check_size(tiles_BNCPP: Tensor, mask_BN: Tensor | None, in_channels: int) -> None:
    shape = tuple(tiles_BNCPP.shape)
    if len(shape) != 5 or shape[2] != in_channels:
        raise UserError(
            f"the model was called on tiles of shape {shape}",
            fix=f"give [bags, tiles, {in_channels}, height, width], as model.in_channels says",
        )
    if mask_BN is None:
        return
    if mask_BN.dtype != torch.bool or tuple(mask_BN.shape) != shape[:2]:
        raise UserError(
            f"the tile mask has shape {tuple(mask_BN.shape)} and type {mask_BN.dtype}",
            fix=f"give booleans of shape {list(shape[:2])}, True for real tiles",
        )
    empty = (~mask_BN.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"bags {empty} of the batch have no real tile", fix="leave such bags out of the batch")
