"""What a folder of features holds: manifest.json, and features.arrow mapped into memory; tars beside them.

Row i belongs to row i of the packed folder that was encoded; labels, splits and boxes stay there, and the
fingerprint of that folder holds the two together. N rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards import samples
from shards.checksums import SHA256_BYTES, XXH3_BYTES
from shards.errors import UserError
from shards.feature_codec import TYPES, FeatureType
from shards.files import atomic_file, sha256_file
from shards.header import ShardInfo
from shards.manifest import FEATURES_FORMAT, MANIFEST_NAME, os_errors_for_users
from shards.members import Place, Places
from shards.remote.folder import Remote, RemoteOptions, fetch_manifest, named_elsewhere
from shards.remote.url import as_path

SCHEMA_VERSION: Final = 2
ROWS_NAME: Final = "features.arrow"
WORK_FOLDER: Final = ".extracting"
AGAIN: Final = "extract the features again into an empty folder, or copy the folder again from where it is whole"
_COLUMNS: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("offset_bytes", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(SHA256_BYTES), nullable=False),
        pa.field("xxh3", pa.binary(XXH3_BYTES), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class FeatureHeader:
    """What manifest.json says beside the rows.

    levels: {stride or tile size: shape of an image's features}; dtype and zstd: how they are stored;
    encoder, bags, data: what made them (name, options and digest of the encoder; how images become tiles; name and
    fingerprint of the packed folder); settings: what else was asked for; rows: name, size and digest of
    features.arrow, and how many rows it has.
    """

    schema_version: int
    format: str
    levels: dict[str, list[int]]
    dtype: FeatureType
    zstd: bool
    encoder: dict[str, Any]
    bags: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    rows: dict[str, Any]
    shards: list[dict[str, Any]]


class Features:
    """A folder of features, opened. It pickles as the name of its folder and is mapped again where unpickled.

    levels: shape of an image's features by stride (or tile size): those that are read.
    """

    def __init__(
        self, directory: Path, header: FeatureHeader, table: pa.Table, *, remote: Remote | None = None
    ) -> None:
        self.directory = directory
        self.remote = remote
        self.where = str(directory) if remote is None else remote.url
        self.header = header
        self.levels = {int(level): tuple(shape) for level, shape in header.levels.items()}
        self.shards = tuple(ShardInfo(**shard) for shard in header.shards)
        self._table = table
        self._shard_N = samples.fixed(table, "shard")
        self._offset_N = samples.fixed(table, "offset_bytes")
        self._num_bytes_N = samples.fixed(table, "num_bytes")
        self._sha256_N32 = samples.digests(table)
        self._xxh3_N16 = samples.digests(table, "xxh3")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.directory, self.header.rows["sha256"], tuple(self.levels), self.remote)

    @property
    def num_bytes(self) -> int:
        """Bytes of an image's levels, decoded."""
        return sum(int(np.prod(shape)) for shape in self.levels.values()) * TYPES[self.header.dtype].itemsize

    def only(self, levels: Sequence[int]) -> Features:
        """The same folder, of which only these levels are read."""
        chosen = Features(self.directory, self.header, self._table, remote=self.remote)
        chosen.levels = {level: self.levels[level] for level in levels}
        return chosen

    def with_tars(self, directory: Path) -> Features:
        """The same folder, the tars of which lie in a folder of this machine."""
        moved = Features(directory, self.header, self._table)
        moved.levels = self.levels
        return moved

    def place(self, row: int) -> Place:
        """Where the features of a row lie."""
        return Place(
            int(self._shard_N[row]),
            int(self._offset_N[row]),
            int(self._num_bytes_N[row]),
            self._sha256_N32[row].tobytes(),
            self._xxh3_N16[row].tobytes(),
        )

    def places(self, row_M: npt.NDArray[np.int64]) -> Places:
        """The same of many rows, as arrays."""
        return Places(self._shard_N[row_M], self._offset_N[row_M], self._num_bytes_N[row_M], self._sha256_N32[row_M])

    def shard_N(self) -> npt.NDArray[np.int32]:  # noqa: N802
        """The tar of every row, an index of `shards`; read-only int32 [N]."""
        return self._shard_N

    def rows(self, shard: int) -> list[int]:
        """The rows whose features lie in a tar."""
        rows: list[int] = np.flatnonzero(self._shard_N == shard).tolist()
        return rows

    def key(self, row: int) -> str:
        """The name of a row's sample in its tar."""
        return str(self._table.column("key")[row].as_py())


def read_features(directory: str | Path, options: RemoteOptions | None = None) -> Features:
    """Open a folder of features; see that every tar is there with its size. Contents are checked when they are read.

    Args:
        directory: a path, or an address as `read_manifest` takes it.
        options: how an address is read.

    Raises:
        UserError: a file is missing, unreadable, of another version, not ours, truncated or changed.
    """
    path = as_path(directory)
    if path is not None:
        features = _read_features(path, None)
        _check_shards(features)
        return features
    copy, remote = fetch_manifest(str(directory), options or RemoteOptions())
    with named_elsewhere(copy, remote):
        features = _read_features(copy, remote)
    remote.check_shards(features.shards, AGAIN)
    return features


def _read_features(directory: Path, remote: Remote | None) -> Features:
    header = _read_header(directory)
    path = directory / ROWS_NAME
    with os_errors_for_users(path):
        if not path.is_file():
            raise UserError("missing, though manifest.json names it", fix=AGAIN, file=path)
        if path.stat().st_size != header.rows["num_bytes"] or sha256_file(path).hex() != header.rows["sha256"]:
            raise UserError("changed since it was extracted: its checksum is another", fix=AGAIN, file=path)
    return _open(directory, header, remote)


def _check_shards(features: Features) -> None:
    for shard in features.shards:
        path = features.directory / shard.name
        with os_errors_for_users(path):
            if not path.is_file():
                raise UserError("missing, though manifest.json names it", fix=AGAIN, file=path)
            size = path.stat().st_size
        if size != shard.num_bytes:
            what = "truncated" if size < shard.num_bytes else "longer than extracted"
            raise UserError(f"{what}: {size} bytes instead of {shard.num_bytes}", fix=AGAIN, file=path)


def write_features(
    directory: Path, rows: Sequence[tuple[str, Place]], shards: Sequence[ShardInfo], fields: Mapping[str, Any]
) -> None:
    """Write features.arrow, then manifest.json, each atomically: with manifest.json the folder is complete.

    Args:
        directory: where the tars lie.
        rows: key and place of every image, in the order of the packed folder's rows.
        shards: the tars.
        fields: the fields of FeatureHeader but schema_version, format, rows and shards.
    """
    columns = [[key for key, _ in rows], *(list(column) for column in zip(*(place for _, place in rows), strict=True))]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS)
    path = directory / ROWS_NAME
    with atomic_file(path, needed_bytes=table.nbytes) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    described = {
        "name": ROWS_NAME,
        "num_bytes": path.stat().st_size,
        "sha256": sha256_file(path).hex(),
        "num_images": table.num_rows,
    }
    header = FeatureHeader(
        schema_version=SCHEMA_VERSION,
        format=FEATURES_FORMAT,
        rows=described,
        shards=[asdict(s) for s in shards],
        **fields,
    )
    with atomic_file(directory / MANIFEST_NAME) as file:
        file.write((json.dumps(asdict(header), indent=1) + "\n").encode())


def _reopen(directory: Path, digest: str, levels: tuple[int, ...], remote: Remote | None) -> Features:
    """What unpickling calls: map again, without hashing, and see that it is still the same folder."""
    features = _open(directory, _read_header(directory), remote)
    if features.header.rows["sha256"] != digest:
        raise UserError("changed while it was in use", fix="start again", file=directory / MANIFEST_NAME)
    return features.only(levels)


def _open(directory: Path, header: FeatureHeader, remote: Remote | None) -> Features:
    path = directory / ROWS_NAME
    try:
        with pa.memory_map(str(path), "r") as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot be read ({error})", fix=AGAIN, file=path) from error
    if not table.schema.equals(_COLUMNS) or table.num_rows == 0:
        raise UserError("its columns are not those of this version", fix=AGAIN, file=path)
    return Features(directory, header, table, remote=remote)


def _read_header(directory: Path) -> FeatureHeader:
    path = directory / MANIFEST_NAME
    with os_errors_for_users(path):
        if not path.is_file():
            if (directory / WORK_FOLDER).is_dir():
                fix = "run the same `msmil extract` command again; it goes on where it stopped"
                raise UserError("the extraction was not finished, there is no manifest.json", fix=fix, file=directory)
            fix = "give the folder that `msmil extract` wrote"
            raise UserError("there is no manifest.json", fix=fix, file=directory)
        encoded = path.read_bytes()
    try:
        content = json.loads(encoded)
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", fix=AGAIN, file=path) from error
    if not isinstance(content, dict) or content.get("format") != FEATURES_FORMAT:
        fix = "give the folder that `msmil extract` wrote"
        raise UserError("is not a manifest of features", fix=fix, file=path)
    if content.get("schema_version") != SCHEMA_VERSION:
        fix = f"extract again with this version of msmil, which reads version {SCHEMA_VERSION}"
        raise UserError(f"is of schema version {content.get('schema_version')}", fix=fix, file=path)
    try:
        return _checked(FeatureHeader(**content))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        thing = f"has other fields than version {SCHEMA_VERSION} has ({error})"
        raise UserError(thing, fix=AGAIN, file=path) from error


def _checked(header: FeatureHeader) -> FeatureHeader:
    """TypeError, ValueError or KeyError where an entry is not what this version writes."""
    for shard in header.shards:
        ShardInfo(**shard)
    for level, shape in header.levels.items():
        if int(level) < 1 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"level {level} has the shape {shape}")
    for entry, keys in (
        ("encoder", ("backbone", "sha256")),
        ("data", ("fingerprint",)),
        ("rows", ("num_bytes", "sha256")),
    ):
        missing = set(keys) - dict(getattr(header, entry)).keys()
        if missing:
            raise ValueError(f"{entry} lacks {', '.join(sorted(missing))}")
    if header.dtype not in TYPES:
        raise ValueError(f"dtype is {header.dtype!r}")
    return header
