"""Files that are whole or absent, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from shards.errors import UserError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY_SUFFIX: Final = ".tmp"


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def human_bytes(count: int) -> str:
    """A size for people: 1.5 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def sha256_file(path: Path) -> bytes:
    """The SHA-256 digest of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def atomic_file(path: Path, *, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Write `path` so that it appears under its name only when it is whole and on the disk.

    Args:
        path: the final name; what was there before stays until the new file replaces it.
        needed_bytes: about how large the file gets, for the message when the disk is full.

    Raises:
        UserError: the disk is full, or a quota or the file size limit is reached. The partial file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        written_bytes = temporary.stat().st_size if temporary.exists() else 0
        free = free_bytes(path.parent)
        temporary.unlink(missing_ok=True)
        if error.errno not in _FULL:
            raise
        needed = "" if needed_bytes is None else f" of about {human_bytes(needed_bytes)} needed"
        what = "over the file size limit (ulimit -f)" if error.errno == errno.EFBIG else "the disk is full"
        thing = f"{what}: {human_bytes(written_bytes)}{needed} written, {human_bytes(free)} free"
        fix = "make room, or write to another disk, and run the same command again; what was finished is kept"
        raise UserError(thing, fix=fix, file=path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files that a killed process left in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the content of a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
