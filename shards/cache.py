"""Bytes by their SHA-256 on a local disk: shared by the processes of a machine, bounded, the longest unused go first.

An object is a file named by the digest of its content. Who fetches it holds a lock on its unfinished file, so that
nobody fetches it twice; the lock of a process that dies is released by the kernel. Every size is put on a ledger
before a byte is written, so that the folder never holds more than the bound.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PART: Final = ".part"
_OBJECTS: Final = "objects"
_LEDGER: Final = "ledger"
# What an eviction leaves, as a share of the bound: it reads the whole folder, and so should be rare.
LEFT: Final = 0.9


class Claim:
    """The right to fetch one object, held until `close`; a context manager."""

    def __init__(self, cache: Cache, digest: bytes, descriptor: int, num_bytes: int) -> None:
        self.digest = digest
        self.num_bytes = num_bytes
        self.descriptor = descriptor
        self.reserved = False
        self._cache = cache
        self._open = True

    def put(self, data: bytes) -> None:
        """Write the object, whose room is reserved, and show it to all.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        assert len(data) == self.num_bytes
        view, done = memoryview(data), 0
        while done < len(data):
            done += os.pwrite(self.descriptor, view[done:], done)
        self.publish()

    def publish(self) -> None:
        """Show what was written into `descriptor` to all."""
        assert self.reserved
        self._cache.show(self.digest)
        self._end()

    def close(self) -> None:
        """Give the right back; what was not published is removed."""
        if not self._open:
            return
        self._cache.drop(self.digest, self.num_bytes if self.reserved else 0)
        self._end()

    def _end(self) -> None:
        self._open = False
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Cache:
    """Objects in a folder, which is made where it is missing.

    Args:
        folder: on a disk of this machine.
        limit_bytes: what all objects together may take.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        (folder / _OBJECTS).mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: bytes) -> Path:
        """Where an object lies, if it is there."""
        name = digest.hex()
        return self.folder / _OBJECTS / name[:2] / name[2:]

    def _part(self, digest: bytes) -> Path:
        """Where it lies while it is fetched."""
        path = self.path(digest)
        return path.with_name(path.name + PART)

    def has(self, digest: bytes) -> bool:
        """Whether an object is there now."""
        return self.path(digest).exists()

    def get(self, digest: bytes, start: int = 0, num_bytes: int | None = None) -> bytes | None:
        """An object or a part of it, None where it is not there; it counts as used now. The digest is not checked."""
        path = self.path(digest)
        try:
            with path.open("rb", buffering=0) as file:
                os.utime(file.fileno())
                file.seek(start)
                return file.read(-1 if num_bytes is None else num_bytes)
        except FileNotFoundError:
            return None

    def claim(self, digest: bytes, num_bytes: int, *, wait: bool) -> Claim | None:
        """The right to fetch an object; None when it is there, or when another has that right.

        Args:
            digest: of the object.
            num_bytes: its size.
            wait: until the other one is done or dead, so that None means that it is there.
        """
        path, part = self.path(digest), self._part(digest)
        while not path.exists():
            part.parent.mkdir(exist_ok=True, mode=0o700)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            # The one who held it before may have renamed or removed the file under our lock.
            if not _is_at(descriptor, part):
                os.close(descriptor)
            elif path.exists():
                part.unlink()
                os.close(descriptor)
            else:
                os.ftruncate(descriptor, 0)  # what one that died had reserved is no longer in use
                return Claim(self, digest, descriptor, num_bytes)
        return None

    def reserve(self, claims: Sequence[Claim]) -> bool:
        """Put claims on the ledger, evicting what was not used for longest; False where there is no room for them.

        There is none when objects that are being fetched now take all of the bound.
        """
        wanted = sum(claim.num_bytes for claim in claims)
        if wanted > self.limit_bytes:
            return False
        with self._ledger() as held:
            if held[0] + wanted > self.limit_bytes:
                held[0] = self._evict(wanted)
            if held[0] + wanted > self.limit_bytes:
                return False
            # An unfinished file has its final size, for others who count.
            for claim in claims:
                os.ftruncate(claim.descriptor, claim.num_bytes)
            held[0] += wanted
        for claim in claims:
            claim.reserved = True
        return True

    def show(self, digest: bytes) -> None:
        """Give an object that is whole its name. Whoever holds the ledger sees no file move while it counts."""
        part = self._part(digest)
        os.utime(part)
        with self._ledger():
            part.rename(self.path(digest))

    def drop(self, digest: bytes, reserved_bytes: int) -> None:
        """Remove an unfinished object, and what was reserved for it from the ledger."""
        with self._ledger() as held:
            self._part(digest).unlink(missing_ok=True)
            held[0] -= reserved_bytes

    def discard(self, digest: bytes) -> None:
        """Remove an object that turned out to be damaged."""
        path = self.path(digest)
        with self._ledger() as held, suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            held[0] -= size

    def held_bytes(self) -> int:
        """What the ledger says is there or on its way."""
        with self._ledger() as held:
            return held[0]

    @contextmanager
    def _ledger(self) -> Iterator[list[int]]:
        """The number of bytes held, in a list of one, to be changed; other processes wait."""
        descriptor = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0)
            held = [int(text) if text.strip().isdigit() else sum(entry[1] for entry in self._entries())]
            yield held
            os.pwrite(descriptor, f"{max(0, held[0]):<32}".encode(), 0)
        finally:
            os.close(descriptor)

    def _evict(self, wanted_bytes: int) -> int:
        """Remove what was not used for longest, and what dead processes left; the bytes that remain."""
        left_bytes = self.limit_bytes * LEFT - wanted_bytes
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if path.suffix == PART:
                total -= size if _removed_if_left(path) else 0
            elif total > left_bytes:
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, size, path) of all objects, finished or not."""
        for folder in (self.folder / _OBJECTS).iterdir():
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime_ns, status.st_size, Path(entry.path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _removed_if_left(part: Path) -> bool:
    """Remove an unfinished file that nobody holds: its process is dead."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if _is_at(descriptor, part):
            part.unlink()
        return True
    finally:
        os.close(descriptor)
