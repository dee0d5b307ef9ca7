"""Files and folders that are whole or absent, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from shards.errors import UserError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY_SUFFIX: Final = ".tmp"
_OLD_SUFFIX: Final = ".old"  # whole, and replaced once another one has its name
_GONE_SUFFIX: Final = ".gone"  # half of it may be deleted
_MAKE_ROOM: Final = "make room, or write to another disk, and run the same command again; what was finished is kept"


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write to the file system of `folder`; the largest number if it has no limit."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize  # a tmpfs with size=0 tells no sizes


def human_bytes(count: int) -> str:
    """A size for people: 1.5 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} EB"


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
    temporary = _hidden(path, TEMPORARY_SUFFIX)
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
        raise _full(error, path, written_bytes, needed_bytes, free) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Write a folder of files so that it appears under its name only when it is whole and on the disk.

    What was there before is replaced then. Cut off in between, it lies under a name that `put_back_folders` knows.
    Yields a folder beside it, whose parents are made.

    Args:
        path: the final name.
        needed_bytes: about how large it gets. Where less is free, nothing is written.

    Raises:
        UserError: the disk is full, or a quota or the file size limit is reached. What was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := free_bytes(path.parent)) < needed_bytes:
        thing = f"the disk is full: {human_bytes(needed_bytes)} are needed, {human_bytes(free)} are free"
        raise UserError(thing, fix=_MAKE_ROOM, file=path)
    temporary, before = _hidden(path, TEMPORARY_SUFFIX), _hidden(path, _OLD_SUFFIX)
    _replaced(before, path)  # of a process that was killed and had our number
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
        if path.exists():
            path.rename(before)
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        written_bytes, free = _size_bytes(temporary), free_bytes(path.parent)
        if error.errno not in _FULL:
            raise
        raise _full(error, path, written_bytes, needed_bytes or None, free) from error
    finally:
        _replaced(before, path)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; cut off in between, it leaves what `remove_leftovers` finds, and no half folder."""
    hidden = _hidden(path, _GONE_SUFFIX)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files and folders that a killed process left in `folder`, and put back what it had whole."""
    put_back_folders(folder)
    for suffix in (TEMPORARY_SUFFIX, _GONE_SUFFIX):
        for leftover in folder.glob(f".*{suffix}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def put_back_folders(folder: Path) -> None:
    """Give a folder its name again that a killed process was replacing. No process may be doing so now."""
    for before in folder.glob(f".*{_OLD_SUFFIX}"):
        name = before.name[1:].removesuffix(_OLD_SUFFIX).rpartition(".")[0]  # without the number of the process
        _replaced(before, before.with_name(name))


def _replaced(before: Path, path: Path) -> None:
    """Delete what was replaced, or put it back where nothing has taken its place."""
    if not path.exists():
        with suppress(OSError):  # there was nothing, or another process has put it back
            before.rename(path)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{suffix}")


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.exists() else 0


def _full(error: OSError, path: Path, written_bytes: int, needed_bytes: int | None, free: int) -> UserError:
    needed = "" if needed_bytes is None else f" of about {human_bytes(needed_bytes)} needed"
    what = "over the file size limit (ulimit -f)" if error.errno == errno.EFBIG else "the disk is full"
    thing = f"{what}: {human_bytes(written_bytes)}{needed} written, {human_bytes(free)} free"
    return UserError(thing, fix=_MAKE_ROOM, file=path)


def sync(path: Path) -> None:
    """Make the content of a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
