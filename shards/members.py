"""Payloads of tars: read by offset and checked against the digest that was written down with them. M rows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from shards.checksums import sha256, xxh3
from shards.errors import UserError
from shards.remote.coming import mean_bytes

if TYPE_CHECKING:
    from shards.header import ShardInfo
    from shards.remote.ahead import Ahead
    from shards.remote.coming import Coming
    from shards.remote.folder import Remote
    from shards.remote.members import RemoteMembers

# Descriptors kept open; a batch reads from a few shards, and a folder may have more tars than a process may open.
MAX_OPEN: Final = 64


class Place(NamedTuple):
    """Where a payload lies: index of the tar, offset and length in bytes; its checksums.

    Of the two one is enough: sha256 is empty, or xxh3 None, where it was not looked up.
    """

    shard: int
    offset_bytes: int
    num_bytes: int
    sha256: bytes
    xxh3: bytes | None = None

    def holds(self, data: bytes | memoryview, *, all_checksums: bool = False) -> bool:
        """Whether these are the bytes that were written there, by the quicker checksum that there is or by both."""
        if self.xxh3 is not None and xxh3(data) != self.xxh3:
            return False
        return sha256(data) == self.sha256 if all_checksums or self.xxh3 is None else True


class Places(NamedTuple):
    """Where payloads lie: arrays [M] of shard, offset and length in bytes, and digests [M, 32]."""

    shard_M: npt.NDArray[np.integer[Any]]
    offset_M: npt.NDArray[np.int64]
    num_bytes_M: npt.NDArray[np.int64]
    sha256_M32: npt.NDArray[np.uint8]


class Called:
    """What errors call a sample; it is looked up when an error is told, not for every sample that is read."""

    __slots__ = ("_look_up", "_row")

    def __init__(self, look_up: Callable[[int], str], row: int) -> None:
        self._look_up, self._row = look_up, row

    def __str__(self) -> str:
        return self._look_up(self._row)


class MemberReader(ABC):
    """Reads payloads from the tars of a folder; a context manager that closes its files.

    Files are opened when they are first needed and opened anew in a forked process.

    Args:
        directory: where the tars lie.
        shards: the tars, by index.
        made: what made them, for the message: "packed".
        fix: what to do about a broken tar.
        remote: where the tars lie instead, if it is elsewhere; they are then read through its cache.
        coming: rows that are going to be read, so that they be fetched before.
        all_checksums: compare SHA-256, too, which is slower.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[ShardInfo],
        *,
        made: str,
        fix: str,
        remote: Remote | None = None,
        coming: Coming | None = None,
        all_checksums: bool = False,
    ) -> None:
        self._directory = directory
        self._shards = shards
        self._made = made
        self._fix = fix
        self._remote = remote
        self._coming = coming
        self._all_checksums = all_checksums
        self._members: RemoteMembers | None = None
        self._ahead: Ahead | None = None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._wants_sha256 = all_checksums or remote is not None  # caches call content by it
        self._memory = memoryview(b"")
        self._pid = os.getpid()

    def close(self) -> None:
        """Close every file; reading opens them again. Nothing is fetched ahead any more."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = self._members = None
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reach(self, batch: int) -> None:
        """Say which of the coming batches is read now; those behind it are fetched meanwhile."""
        if self._remote is None or self._coming is None:
            return
        if self._ahead is None:
            from shards.remote.ahead import Ahead

            sample_bytes = mean_bytes(self._shards)
            self._ahead = Ahead(self._of_remote(self._remote), self._places, self._coming, sample_bytes)
        self._ahead.reach(batch)

    @property
    def waits(self) -> int:
        """How often a sample was not there when it was wanted, since its tar lies elsewhere."""
        return 0 if self._members is None else self._members.waits

    @abstractmethod
    def _places(self, row_M: npt.NDArray[np.int64]) -> Places:
        """Where the payloads of rows lie."""

    def _of_remote(self, remote: Remote) -> RemoteMembers:
        from shards.remote.members import RemoteMembers

        if self._members is None:
            self._members = RemoteMembers(remote, self._shards, self._error)
        return self._members

    def _payload(self, place: Place, name: Called, *, lasting: bool) -> bytes | memoryview:
        """The bytes at a place; `name` is what the errors call them.

        Those that need not be `lasting` may lie in memory that the next ones are read into.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed.
        """
        if self._remote is not None:
            return self._of_remote(self._remote).payload(place, name)
        try:
            descriptor = self._open(place.shard)
            data = _read_anew(descriptor, place) if lasting else self._read_again(descriptor, place)
            if len(data) < place.num_bytes:
                end, size = place.offset_bytes + place.num_bytes, os.fstat(descriptor).st_size
                thing = f"truncated: {name} ends at byte {end}, the file at byte {size}"
                raise self._error(place.shard, thing)
        except FileNotFoundError as error:
            raise self._error(place.shard, f"missing: {name} cannot be read") from error
        except OSError as error:
            raise self._error(place.shard, f"{name} cannot be read ({error.strerror})") from error
        if not place.holds(data, all_checksums=self._all_checksums):
            thing = f"changed since it was {self._made}: the checksum of {name} is another"
            raise self._error(place.shard, thing)
        return data

    def _error(self, shard: int, thing: str, fix: str | None = None) -> UserError:
        where = self._directory if self._remote is None else self._remote.url
        return UserError(thing, fix=fix or self._fix, file=f"{where}/{self._shards[shard].name}")

    def _read_again(self, descriptor: int, place: Place) -> memoryview:
        """What is there of a payload, in memory that stays in the processor's caches."""
        if len(self._memory) < place.num_bytes:
            self._memory = memoryview(bytearray(place.num_bytes))
        memory = self._memory[: place.num_bytes]
        done = read = os.preadv(descriptor, [memory], place.offset_bytes)
        while read and done < place.num_bytes:
            read = os.preadv(descriptor, [memory[done:]], place.offset_bytes + done)
            done += read
        return memory[:done]

    def _open(self, shard: int) -> int:
        if self._pid != os.getpid():
            # After a fork: these descriptors are the parent's files; ours are opened anew, and the copies closed.
            self.close()
            self._pid = os.getpid()
        descriptor = self._files.get(shard)
        if descriptor is not None:
            self._files.move_to_end(shard)
            return descriptor
        descriptor = os.open(self._directory / self._shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) >= MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        return descriptor


def _read_anew(descriptor: int, place: Place) -> bytes:
    """What is there of a payload, in memory of its own."""
    data = os.pread(descriptor, place.num_bytes, place.offset_bytes)
    while len(data) < place.num_bytes:
        more = os.pread(descriptor, place.num_bytes - len(data), place.offset_bytes + len(data))
        if not more:
            break
        data += more
    return data
