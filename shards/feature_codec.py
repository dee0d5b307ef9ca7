"""An image's features as bytes: a safetensors file of one tensor per level, as it is or behind Zstandard.

A level is a map of a stride, [N, D, h, w], or a vector per tile of a size, [N, D]; N tiles, D channels, h w its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shards.errors import UserError

FeatureType = Literal["fp32", "bf16", "fp16"]
TYPES: Final[dict[FeatureType, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_ZSTD_LEVEL: Final = 3


def extension(zstd: bool) -> str:
    """What follows the key in a tar; `zstd -d x.safetensors.zst` gives a file for safetensors."""
    return "safetensors.zst" if zstd else "safetensors"


def encode(levels: Mapping[int, Tensor], dtype: FeatureType, *, zstd: bool) -> bytes:
    """The levels of one image as bytes; the same numbers give the same bytes.

    Args:
        levels: float32 by stride (or tile size), on the CPU.
        dtype: how numbers are stored, rounded to nearest.
        zstd: compress.

    Raises:
        UserError: a number is not finite, or too large for fp16.
    """
    stored = {str(level): x.to(TYPES[dtype]).contiguous() for level, x in levels.items()}
    for level, x in levels.items():
        if not bool(stored[str(level)].isfinite().all()):
            largest = float(x.abs().max())
            if bool(x.isfinite().all()):
                fix = "store bf16 or fp32 (--dtype)"
                raise UserError(f"level {level} reaches {largest:.3g}, which {dtype} cannot hold", fix=fix)
            fix = "look at the image and at the encoder's weights"
            raise UserError(f"level {level} holds numbers that are not finite", fix=fix)
    data: bytes = save(stored)
    if not zstd:
        return data
    compressed: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(data)
    return compressed


def decode(
    data: bytes | memoryview, shapes: Mapping[int, tuple[int, ...]], dtype: FeatureType, *, zstd: bool, name: object
) -> dict[int, Tensor]:
    """Bytes as the levels of one image, in the type they are stored in.

    Args:
        data: what `encode` gave.
        shapes: of the wanted levels; others that are stored are left out.
        dtype: the type that they must have.
        zstd: whether it was compressed.
        name: what errors call the image, as a text.

    Raises:
        UserError: the bytes are no such file, or hold another shape or type.
    """
    fix = "extract the features again into an empty folder"
    try:
        stored = load(zstandard.ZstdDecompressor().decompress(data) if zstd else bytes(data))
    except (SafetensorError, zstandard.ZstdError, ValueError) as error:
        raise UserError(f"the features of {name} cannot be decoded ({error})", fix=fix) from error
    levels: dict[int, Tensor] = {}
    for level, shape in shapes.items():
        x = stored.get(str(level))
        if x is None:
            raise UserError(f"the features of {name} lack level {level}", fix=fix)
        if x.dtype != TYPES[dtype] or tuple(x.shape) != tuple(shape):
            got, wanted = f"{list(x.shape)} {x.dtype}", f"{list(shape)} {TYPES[dtype]}"
            thing = f"level {level} of {name} is {got} where the manifest says {wanted}"
            raise UserError(thing.replace("torch.", ""), fix=fix)
        levels[level] = x
    return levels
