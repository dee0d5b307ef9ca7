"""How the C library keeps memory that is freed.

glibc gives large blocks back to the system when they are freed, and gets them anew, page by page and zeroed, for the
next image or tensor of that size: for the large maps of a mammogram the page faults take several times as long as the
element-wise arithmetic in them, and a third of the time in which an image is decoded. Kept, the same memory serves
every image, layer and step.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # of mallopt(3)
_KEPT: Final = {_MMAP_MAX: 0, _TOP_PAD: 64 << 20}
_MOST_BYTES: Final = 2**31 - 1
# what glibc's own thresholds have grown to once large blocks were freed, which stops when one is set
_GROWN: Final = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20}


def keep_freed_memory(up_to_bytes: int = _MOST_BYTES) -> None:
    """Keep so much of what is freed at the end of the heap. Does nothing where the C library is not glibc."""
    assert 0 < up_to_bytes <= _MOST_BYTES
    _set(_KEPT | {_TRIM_THRESHOLD: up_to_bytes})


def return_freed_memory() -> None:
    """As glibc does by itself: large blocks go back at once. What was kept goes back now."""
    _set(_GROWN)
    trim()


def trim() -> None:
    """Give what is free now back to the system."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    library = _library()
    if library is not None:
        for option, value in options.items():
            library.mallopt(option, value)


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
