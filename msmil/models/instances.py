"""From tiles to the instances of each scale.

Legend: B bags, N tiles, M tiles of all bags, C channels, P tile side, I instances of a tile, D channels, h w size of a
map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Encoded(NamedTuple):
    """What the backbone made of real tiles at one level, and which bags they belong to.

    x_MX: maps [M, D, h, w], or vectors [M, D]; bags_tiles: B and N; mask_BN: True for real tiles, None: all are.
    """

    x_MX: Tensor
    bags_tiles: tuple[int, int]
    mask_BN: Tensor | None

    def instances(self, x_MID: Tensor) -> Instances:
        """Instances of these tiles, with zeros in the place of padded ones."""
        bags, tiles = self.bags_tiles
        if self.mask_BN is not None:
            every_MID = x_MID.new_zeros(bags * tiles, *x_MID.shape[1:])
            every_MID[self.mask_BN.flatten()] = x_MID
            x_MID = every_MID
        return Instances(x_MID.unflatten(0, (bags, tiles)), self.mask_BN)


def encode_maps(backbone: Backbone, tiles_BNCPP: Tensor, mask_BN: Tensor | None) -> dict[int, Encoded]:
    """{stride: maps of the tiles}. Padded tiles are not encoded."""
    maps = backbone(_real(tiles_BNCPP, mask_BN))
    size = tiles_BNCPP.shape[:2]  # no len(): it would fix the number of bags of an exported graph
    return {
        s: Encoded(map_MDhw, (size[0], size[1]), mask_BN) for s, map_MDhw in zip(backbone.strides, maps, strict=True)
    }


def encode_pooled(backbone: Backbone, tiles_BNCPP: Tensor, mask_BN: Tensor | None) -> Encoded:
    """One vector per tile: the mean over the backbone's last map (FPN-MIL, single-scale and multi-scale patches)."""
    map_MDhw = backbone(_real(tiles_BNCPP, mask_BN))[-1]
    return Encoded(map_MDhw.mean((2, 3)), (tiles_BNCPP.shape[0], tiles_BNCPP.shape[1]), mask_BN)


def stored(levels: Mapping[int, Tensor], wanted: Sequence[int], mask: TileMask | None) -> dict[int, Encoded]:
    """What was encoded before, [B, N, ...] by level, as `Encoded`."""
    masks = {level: mask_of(mask, level) for level in wanted}
    return {
        level: Encoded(_real(levels[level], masks[level]), (len(levels[level]), levels[level].shape[1]), masks[level])
        for level in wanted
    }


def pyramid_instances(pyramid: FeaturePyramid, encoded: Sequence[Encoded]) -> dict[int, Instances]:
    """{stride: the cells of its map}, from the backbone's maps, finest first."""
    levels = pyramid.levels([level.x_MX for level in encoded])
    return {
        scale: encoded[0].instances(map_MDhw.permute(0, 2, 3, 1).flatten(1, 2)) for scale, map_MDhw in levels.items()
    }


def mask_of(mask: TileMask | None, size: int | None) -> Tensor | None:
    """The mask of one tile size; one mask serves where there is one size."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    assert size is not None
    return mask[size]


def _real(x_BNX: Tensor, mask_BN: Tensor | None) -> Tensor:
    """What belongs to real tiles, [M, ...]."""
    x_MX = x_BNX.flatten(0, 1)
    return x_MX if mask_BN is None else x_MX[mask_BN.flatten()]


def check_tiles(tiles: Tiles | None, mask: TileMask | None, *, in_channels: int, sizes: tuple[int, ...] | None) -> None:
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
    if not isinstance(tiles, Mapping) or set(tiles) != set(sizes):
        given = f"tiles of the sizes {list(tiles)}" if isinstance(tiles, Mapping) else "one tensor"
        raise UserError(f"the model was called on {given}", fix=fix)
    if isinstance(mask, Tensor) or (mask is not None and set(mask) != set(sizes)):
        raise UserError("the mask does not go with the tiles", fix=f"give {{tile size: mask}} for {list(sizes)}")
    for size in sizes:
        _check_size(tiles[size], None if mask is None else mask[size], in_channels)
    bags = [tiles[size].shape[0] for size in sizes]
    if any(count != bags[0] for count in bags):
        raise UserError(f"the tile sizes have {bags} bags", fix="give every bag in each size")


def _check_size(tiles_BNCPP: Tensor, mask_BN: Tensor | None, in_channels: int) -> None:
    shape = tuple(tiles_BNCPP.shape)
    if len(shape) != 5 or shape[2] != in_channels:
        raise UserError(
            f"the model was called on tiles of shape {shape}",
            fix=f"give [bags, tiles, {in_channels}, height, width], as model.in_channels says",
        )
    _check_mask(mask_BN, shape[:2])


def check_levels(levels: Mapping[int, Tensor], mask: TileMask | None, wanted: Mapping[int, int], *, maps: bool) -> None:
    """Refuse stored levels that a model cannot start from.

    Args:
        levels: what was given.
        mask: likewise.
        wanted: channels of each level that the model needs.
        maps: levels are maps [B, N, D, h, w], not vectors [B, N, D].

    Raises:
        UserError: a level is missing or has another shape, a mask does not fit.
    """
    axes = 5 if maps else 3
    shapes = {level: tuple(x.shape) for level, x in levels.items()}
    fitting = [s for s, channels in wanted.items() if s in shapes and shapes[s][2:3] == (channels,)]
    if len(fitting) < len(wanted) or any(len(shapes[level]) != axes for level in wanted):
        axis_names = "channels, height, width" if maps else "channels"
        raise UserError(
            f"the model was called on levels of shapes {shapes}",
            fix=f"give [bags, tiles, {axis_names}] for these levels and channels: {dict(wanted)}",
        )
    for level in wanted:
        _check_mask(mask_of(mask, level), shapes[level][:2])


def _check_mask(mask_BN: Tensor | None, bags_tiles: tuple[int, ...]) -> None:
    if mask_BN is None:
        return
    if mask_BN.dtype != torch.bool or tuple(mask_BN.shape) != bags_tiles:
        raise UserError(
            f"the tile mask has shape {tuple(mask_BN.shape)} and type {mask_BN.dtype}",
            fix=f"give booleans of shape {list(bags_tiles)}, True for real tiles",
        )
    empty = (~mask_BN.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"bags {empty} of the batch have no real tile", fix="leave such bags out of the batch")
