"""Checksums of payloads.

SHA-256 names content: in manifests, in caches, and where a stranger's copy is told from ours. XXH3 (128 bits) tells
whether bytes changed by accident, and is ten times as fast: it is what every read is checked by.
"""

from __future__ import annotations

import hashlib
from typing import Final

import xxhash

SHA256_BYTES: Final = 32
XXH3_BYTES: Final = 16


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256 of some bytes."""
    return hashlib.sha256(data).digest()


def xxh3(data: bytes | memoryview) -> bytes:
    """XXH3 of some bytes, 128 bits, the same on every machine."""
    digest: bytes = xxhash.xxh3_128_digest(data)
    return digest
