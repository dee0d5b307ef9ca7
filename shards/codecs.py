"""Grey images as bytes, without loss.

`png` is what every viewer opens. `zstd` is a .npy file behind Zstandard: it decodes several times faster and is a
little larger. H W pixels.
"""

from __future__ import annotations

import functools
import io
import threading
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import zstandard
from PIL import Image

from shards.errors import UserError

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Codec = Literal["png", "zstd"]
CODECS: Final[tuple[Codec, ...]] = ("png", "zstd")

# What follows the key in a tar, by codec; `zstd -d x.npy.zst` gives a file for numpy.load.
EXTENSION: Final[dict[str, str]] = {"png": "png", "zstd": "npy.zst"}

_ZSTD_LEVEL: Final = 3
LEAD_BYTES: Final = 128  # of the .npy header of a grey image: numpy pads to a multiple of 64
_PIL_MODES: Final = ("L", "I;16")  # uint8, uint16


def encode(image_HW: Pixels, codec: Codec) -> bytes:
    """Pixels as bytes; the same pixels give the same bytes, and nothing but pixels goes in.

    Args:
        image_HW: uint8 or uint16, [H, W].
        codec: one of CODECS.
    """
    assert image_HW.ndim == 2, image_HW.shape
    assert image_HW.dtype in (np.uint8, np.uint16), image_HW.dtype
    data = io.BytesIO()
    if codec == "png":
        Image.fromarray(np.ascontiguousarray(image_HW)).save(data, format="PNG")
        return data.getvalue()
    np.lib.format.write_array(data, np.ascontiguousarray(image_HW), version=(1, 0), allow_pickle=False)
    compressed: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(data.getvalue())
    return compressed


def decode(
    data: bytes | memoryview, codec: Codec, *, expect_hw: tuple[int, int], dtype: npt.DTypeLike, name: object
) -> Pixels:
    """Bytes as pixels [H, W], not to be written to.

    Args:
        data: what `encode` gave.
        codec: the codec it was given.
        expect_hw: the height and width that the image must have.
        dtype: uint8 or uint16, which it must have.
        name: what the error calls the image as a text, for example "shard-000000.tar, sample abc".

    Raises:
        UserError: the bytes are no such image.
    """
    try:
        image_HW = _decode_png(data) if codec == "png" else _decode_zstd(data)
    except (OSError, SyntaxError, ValueError, zstandard.ZstdError) as error:
        thing = f"the image of {name} cannot be decoded as {codec} ({error})"
        raise UserError(thing, fix="run `msmil verify` on the folder, and pack it again where it is broken") from error
    if image_HW.shape != expect_hw or image_HW.dtype != np.dtype(dtype):
        got = f"{image_HW.shape[0]} x {image_HW.shape[1]} {image_HW.dtype}"
        wanted = f"{expect_hw[0]} x {expect_hw[1]} {np.dtype(dtype)}"
        fix = "pack the folder again: the image is not the one that its manifest describes"
        raise UserError(f"the image of {name} is {got} (height x width) instead of {wanted}", fix=fix)
    return image_HW


def decode_into(
    room_R: npt.NDArray[np.uint8],
    data: bytes | memoryview,
    codec: Codec,
    *,
    expect_hw: tuple[int, int],
    dtype: npt.DTypeLike,
    name: object,
) -> None:
    """Like `decode`, into memory that is there.

    Args:
        room_R: LEAD_BYTES bytes that are needed meanwhile, and are afterwards as they were before; then the pixels.
        data, codec, expect_hw, dtype, name: as for `decode`.

    Raises:
        UserError: the bytes are no such image; what the pixels are then is not said.
    """
    assert len(room_R) == LEAD_BYTES + expect_hw[0] * expect_hw[1] * np.dtype(dtype).itemsize
    if codec == "zstd" and _decode_zstd_into(room_R.data, data, (expect_hw, np.dtype(dtype), LEAD_BYTES)):
        return
    image_HW = decode(data, codec, expect_hw=expect_hw, dtype=dtype, name=name)
    room_R[LEAD_BYTES:].view(image_HW.dtype).reshape(expect_hw)[:] = image_HW


class _Own(threading.local):
    """What a thread keeps: a decompressor's tables take longer to make than to use again."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_own = _Own()


def _decode_png(data: bytes | memoryview) -> Pixels:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.mode not in _PIL_MODES:
            raise ValueError(f"not grey: mode {image.mode}")
        return np.asarray(image)


def _decode_zstd(data: bytes | memoryview) -> Pixels:
    raw = _own.decompressor.decompress(data)
    shape, dtype, start = _npy_header(raw[:LEAD_BYTES])
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)


def _decode_zstd_into(
    room: memoryview, data: bytes | memoryview, head: tuple[tuple[int, int], np.dtype[Any], int]
) -> bool:
    """Whether the bytes are a .npy of this head that fills the room; its pixels are there then."""
    lead = bytes(room[:LEAD_BYTES])
    try:
        if zstandard.frame_content_size(data) != len(room):
            return False
        # With room for all of it Zstandard writes there, and not into memory of its own first.
        filled = _own.decompressor.stream_reader(data).readinto(room)
        return filled == len(room) and _npy_header(bytes(room[:LEAD_BYTES])) == head
    except (ValueError, zstandard.ZstdError):
        return False  # `decode` says what is wrong
    finally:
        room[:LEAD_BYTES] = lead


@functools.lru_cache(maxsize=16)  # it is a Python expression, and all images of a folder have the same
def _npy_header(head: bytes) -> tuple[tuple[int, int], np.dtype[Any], int]:
    """Shape, type, and where the pixels begin in a .npy of this head."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("is not of version 1.0 of .npy")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 2 or by_column or dtype not in (np.uint8, np.uint16):
        raise ValueError(f"holds {dtype} of shape {shape}")
    return shape, dtype, file.tell()
