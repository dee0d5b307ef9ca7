"""Pixels of one sample: read by offset from its tar, checked against the manifest, decoded. H W pixels."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from types import TracebackType
from typing import Final

from shards.codecs import CODECS, Pixels, decode
from shards.errors import UserError
from shards.manifest import Manifest

# Descriptors kept open; a batch reads from a few shards, and a folder may have more tars than a process may open.
_MAX_OPEN: Final = 64


class ShardReader:
    """Reads samples of a packed folder; a context manager that closes its files.

    Files are opened when they are first needed and opened anew in a forked process.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def read(self, row: int) -> Pixels:
        """The image of a manifest row, [H, W] of the manifest's size and type; its SHA-256 is checked every time.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed, or the image is not as the manifest says.
        """
        shard, offset, num_bytes, digest = self.manifest.location(row)
        data = self._read_bytes(row, shard, offset, num_bytes)
        if hashlib.sha256(data).digest() != digest:
            thing = f"changed since it was packed: the checksum of {self._name(row)} is another"
            raise self._error(shard, thing)
        codec = self.manifest.codec
        assert codec in CODECS
        size = (self.manifest.height_px, self.manifest.width_px)
        try:
            return decode(data, codec, expect_hw=size, dtype=self.manifest.dtype, name=self._name(row))
        except UserError as error:
            raise self._error(shard, error.thing, error.fix) from error

    def close(self) -> None:
        """Close every file; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_bytes(self, row: int, shard: int, offset: int, num_bytes: int) -> bytes:
        try:
            descriptor = self._open(shard)
            data = os.pread(descriptor, num_bytes, offset)
            while len(data) < num_bytes:
                more = os.pread(descriptor, num_bytes - len(data), offset + len(data))
                if not more:
                    size = os.fstat(descriptor).st_size
                    thing = f"truncated: {self._name(row)} ends at byte {offset + num_bytes}, the file at byte {size}"
                    raise self._error(shard, thing)
                data += more
        except FileNotFoundError as error:
            raise self._error(shard, f"missing: {self._name(row)} cannot be read") from error
        except OSError as error:
            raise self._error(shard, f"{self._name(row)} cannot be read ({error.strerror})") from error
        return data

    def _open(self, shard: int) -> int:
        if self._pid != os.getpid():
            # After a fork: these descriptors are the parent's files; ours are opened anew, and the copies closed.
            self.close()
            self._pid = os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = os.open(self.manifest.directory / self.manifest.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) >= _MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        return descriptor

    def _name(self, row: int) -> str:
        return f"sample {self.manifest.text('image_id', [row])[0]} (row {row})"

    def _error(self, shard: int, thing: str, fix: str | None = None) -> UserError:
        directory = self.manifest.directory
        fix = fix or f"run `msmil verify {directory}` to see what is broken, then copy the folder or pack it again"
        return UserError(thing, fix=fix, file=directory / self.manifest.shards[shard].name)
