"""Payloads of tars: read by offset and checked against the digest that was written down with them."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from shards.errors import UserError

# Descriptors kept open; a batch reads from a few shards, and a folder may have more tars than a process may open.
MAX_OPEN: Final = 64


class Place(NamedTuple):
    """Where a payload lies: index of the tar, offset and length in bytes, SHA-256."""

    shard: int
    offset_bytes: int
    num_bytes: int
    sha256: bytes


class MemberReader:
    """Reads payloads from the tars of a folder; a context manager that closes its files.

    Files are opened when they are first needed and opened anew in a forked process.

    Args:
        directory: where the tars lie.
        names: of the tars, by index.
        made: what made them, for the message: "packed".
        fix: what to do about a broken tar.
    """

    def __init__(self, directory: Path, names: Sequence[str], *, made: str, fix: str) -> None:
        self._directory = directory
        self._names = names
        self._made = made
        self._fix = fix
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def close(self) -> None:
        """Close every file; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _payload(self, place: Place, name: str) -> bytes:
        """The bytes at a place; `name` is what the errors call them.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed.
        """
        data = self._read_bytes(place, name)
        if hashlib.sha256(data).digest() != place.sha256:
            thing = f"changed since it was {self._made}: the checksum of {name} is another"
            raise self._error(place.shard, thing)
        return data

    def _error(self, shard: int, thing: str, fix: str | None = None) -> UserError:
        return UserError(thing, fix=fix or self._fix, file=self._directory / self._names[shard])

    def _read_bytes(self, place: Place, name: str) -> bytes:
        shard, offset, num_bytes, _ = place
        try:
            descriptor = self._open(shard)
            data = os.pread(descriptor, num_bytes, offset)
            while len(data) < num_bytes:
                more = os.pread(descriptor, num_bytes - len(data), offset + len(data))
                if not more:
                    size = os.fstat(descriptor).st_size
                    thing = f"truncated: {name} ends at byte {offset + num_bytes}, the file at byte {size}"
                    raise self._error(shard, thing)
                data += more
        except FileNotFoundError as error:
            raise self._error(shard, f"missing: {name} cannot be read") from error
        except OSError as error:
            raise self._error(shard, f"{name} cannot be read ({error.strerror})") from error
        return data

    def _open(self, shard: int) -> int:
        if self._pid != os.getpid():
            # After a fork: these descriptors are the parent's files; ours are opened anew, and the copies closed.
            self.close()
            self._pid = os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = os.open(self._directory / self._names[shard], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) >= MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        return descriptor
