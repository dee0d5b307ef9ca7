"""Grey image files of an archive, read with a clear word on what is wrong with one. H W pixels, C channels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.codecs import Pixels
from shards.errors import UserError

_FORMATS: Final = ("PNG", "TIFF", "JPEG")
_GREY_16: Final = ("I;16", "I;16L", "I;16B")
_COLOUR: Final = ("RGB", "RGBA", "LA", "P", "CMYK", "YCbCr")


class BrokenImageError(UserError):
    """An image that cannot be packed; `reason` is one of a few words, so that dropped images can be counted by it."""

    def __init__(self, reason: str, thing: str, *, fix: str, file: Path) -> None:
        self.reason = reason
        super().__init__(thing, fix=fix, file=file)


MISSING: Final = "file is missing"
EMPTY: Final = "file is empty"
UNREADABLE: Final = "truncated, or not an image"
NOT_GREY: Final = "not a grey image of 8 or 16 bit"
OTHER_SIZE: Final = "another size than the others"
NO_BREAST: Final = "nothing but air in it"
REASONS: Final = (MISSING, EMPTY, UNREADABLE, NOT_GREY, OTHER_SIZE, NO_BREAST)

DROP_HINT: Final = "or leave such images out with --on-broken drop"


def check_file(path: Path) -> int:
    """The size of an image file in bytes.

    Raises:
        BrokenImageError: it is missing, empty, or not ours to look at.
    """
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = f"complete the download, check --images, {DROP_HINT}"
        raise BrokenImageError(MISSING, "the image is missing", fix=fix, file=path) from error
    except OSError as error:
        thing = f"the image cannot be read ({error.strerror})"
        raise BrokenImageError(UNREADABLE, thing, fix=f"see to its permissions, {DROP_HINT}", file=path) from error
    if size == 0:
        raise BrokenImageError(EMPTY, "the image is an empty file", fix=f"copy it again, {DROP_HINT}", file=path)
    return size


def read_grey(path: Path) -> Pixels:
    """The pixels of a grey PNG, TIFF or JPEG file: uint8 or uint16 [H, W].

    Raises:
        BrokenImageError: the file is missing, empty, truncated, no image, or not grey of 8 or 16 bit.
    """
    check_file(path)
    try:
        file = io.BytesIO(path.read_bytes())
        # Pillow checks the checksums of a PNG file only when asked: zeros in the middle of one would decode to pixels.
        Image.open(file, formats=_FORMATS).verify()
        file.seek(0)
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            if image.mode == "L":
                return np.array(image, dtype=np.uint8)
            if image.mode in _GREY_16:
                return np.array(image, dtype=np.uint16)
            raise _not_grey(image, path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        thing = f"the image cannot be read ({error})"
        fix = f"copy it again from the archive, {DROP_HINT}"
        raise BrokenImageError(UNREADABLE, thing, fix=fix, file=path) from error


def _not_grey(image: Image.Image, path: Path) -> BrokenImageError:
    fix = f"convert it to a grey PNG of 8 or 16 bit, {DROP_HINT}"
    if image.mode not in _COLOUR:
        thing = f"the image has pixels of type {image.mode!r}, not 8 or 16 bit grey"
        return BrokenImageError(NOT_GREY, thing, fix=fix, file=path)
    colour_HWC: npt.NDArray[np.uint8] = np.array(image.convert("RGB"))
    equal = bool((colour_HWC == colour_HWC[..., :1]).all())
    which = "equal channels (grey stored as colour)" if equal else "different channels (a colour image)"
    thing = f"the image is {image.mode}, with {which}"
    if not equal:
        fix = f"look whether it is a mammogram, and {fix}"
    return BrokenImageError(NOT_GREY, thing, fix=fix, file=path)
