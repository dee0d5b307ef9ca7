"""Tars whose bytes depend on nothing but names and contents: no time, no user, one mode."""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO, Final

_BLOCK_BYTES: Final = tarfile.BLOCKSIZE
_RECORD_BYTES: Final = tarfile.RECORDSIZE
_MODE: Final = 0o644


class TarWriter:
    """Appends members to an open file and knows where each payload lies.

    num_bytes and sha256() describe everything written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its payload in bytes."""
        # TarInfo starts with mtime 0, uid 0, gid 0 and no user names.
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), _MODE
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK_BYTES))
        return offset

    def finish(self) -> None:
        """Write the end of the archive: two empty blocks, filled up to a whole record as tar does."""
        self._write(bytes(2 * _BLOCK_BYTES))
        self._write(bytes(-self.num_bytes % _RECORD_BYTES))

    def sha256(self) -> bytes:
        """Digest of what was written so far."""
        return self._digest.digest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def member_bytes(payload_bytes: int) -> int:
    """Bytes that a member of this size takes in a tar, with its header."""
    return _BLOCK_BYTES + -(-payload_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
