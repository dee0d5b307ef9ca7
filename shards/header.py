"""What manifest.json of a packed folder says, and whether it says it rightly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from shards.codecs import CODECS, Codec
from shards.errors import UserError

SCHEMA_VERSION: Final = 2
DTYPES: Final = ("uint8", "uint16")
FORMAT: Final = "msmil-shards"
REPACK: Final = "pack again into an empty folder, or copy the folder again from where it is whole"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar of the folder."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What manifest.json says beside the rows.

    settings: what `pack` was asked for; samples: name, size, digest and number of rows of samples.arrow;
    counts: images, exams, patients, positives, boxes per split; dropped and notes: what packing left out or mended.
    """

    schema_version: int
    format: str
    name: str
    labels: list[str]
    height_px: int
    width_px: int
    dtype: Literal["uint8", "uint16"]
    codec: Codec
    recipe: dict[str, Any]
    fingerprint: str
    settings: dict[str, Any]
    samples: dict[str, Any]
    counts: dict[str, Any]
    dropped: list[dict[str, Any]]
    notes: dict[str, int]
    shards: list[dict[str, Any]]


def parse_header(encoded: bytes, path: Path) -> Header:
    """The content of a manifest.json.

    Args:
        encoded: the bytes of the file.
        path: of the file, for the message.

    Raises:
        UserError: it is no manifest, of another version, or broken.
    """
    try:
        content = json.loads(encoded)
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", fix=REPACK, file=path) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        fix = "give the folder that `msmil pack` wrote"
        raise UserError("is not a manifest of packed mammograms", fix=fix, file=path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        fix = f"pack again with this version of msmil, which reads version {SCHEMA_VERSION}"
        raise UserError(f"is of schema version {version}", fix=fix, file=path)
    try:
        header = Header(**content)
        _check_entries(header)
    except (TypeError, ValueError) as error:
        raise UserError(f"has other fields than version {version} has ({error})", fix=REPACK, file=path) from error
    for field, value, known in (("codec", header.codec, CODECS), ("dtype", header.dtype, DTYPES)):
        if value not in known:
            thing = f"names the {field} {value!r}; known are {', '.join(known)}"
            raise UserError(thing, fix=REPACK, file=path)
    return header


def _check_entries(header: Header) -> None:
    """TypeError or ValueError where an entry of `shards` or `samples` is not what this version writes."""
    for shard in header.shards:
        ShardInfo(**shard)
    missing = {"name", "num_bytes", "sha256", "num_samples"} - dict(header.samples).keys()
    if missing:
        raise ValueError(f"samples lacks {', '.join(sorted(missing))}")
