"""What a packed folder holds: manifest.json, and samples.arrow mapped into memory. N rows (samples), K labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards import samples
from shards.errors import UserError
from shards.files import atomic_file, sha256_file
from shards.header import FORMAT, REPACK, SCHEMA_VERSION, Header, ShardInfo, parse_header
from shards.members import Place, Places
from shards.remote.folder import Remote, RemoteOptions, fetch_manifest, named_elsewhere
from shards.remote.url import as_path
from shards.types import SampleRecord

MANIFEST_NAME: Final = "manifest.json"
SAMPLES_NAME: Final = "samples.arrow"
WORK_FOLDER: Final = ".packing"
FEATURES_FORMAT: Final = "msmil-features"


class Manifest:
    """A packed folder, opened. Rows are numbered 0..N-1 in the order of the shards.

    It pickles as the name of its folder and is mapped again where it is unpickled.

    directory: where manifest.json and samples.arrow are mapped from, and where the tars lie unless `remote` says that
    they lie elsewhere; then it is this machine's copy. place: the folder as people know it, a path or an address.
    """

    def __init__(
        self,
        directory: Path,
        header: Header,
        table: pa.Table,
        *,
        rows: Mapping[str, npt.NDArray[np.int64]] | None = None,
        fingerprint: str | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.directory = directory
        self.remote = remote
        self.place = str(directory) if remote is None else remote.url
        self.header = header
        self.labels = tuple(header.labels)
        self.height_px, self.width_px = header.height_px, header.width_px
        self.dtype = header.dtype
        self.codec = header.codec
        self.recipe = header.recipe
        self.fingerprint = fingerprint or header.fingerprint
        self.shards = tuple(ShardInfo(**shard) for shard in header.shards)
        self._table = table
        self._rows = rows
        self._shard_N = samples.fixed(table, "shard")
        self._offset_N = samples.fixed(table, "offset_bytes")
        self._num_bytes_N = samples.fixed(table, "num_bytes")
        self._sha256_N32 = samples.digests(table)
        self._xxh3_N16 = samples.digests(table, "xxh3")
        self._label_N = {label: samples.fixed(table, samples.LABEL_PREFIX + label) for label in self.labels}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.directory, self.header.fingerprint, self._rows, self.fingerprint, self.remote)

    @property
    def table(self) -> pa.Table:
        """All rows with the columns of samples.arrow, mapped, not copied."""
        return self._table

    def record(self, row: int) -> SampleRecord:
        """Everything about one row; for many rows use the columns."""
        return samples.to_record(self._table, int(row), self.labels)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split, ascending; empty where there is none."""
        if self._rows is not None:
            return self._rows[split]
        code_N, texts = samples.codes(self._table, "split")
        if split not in texts:
            return np.empty(0, np.int64)
        return np.flatnonzero(code_N == texts.index(split))

    def with_rows(self, rows: Mapping[str, npt.NDArray[np.int64]], *, fingerprint: str) -> Manifest:
        """The same folder with other rows in its splits, and the fingerprint of that choice."""
        return Manifest(
            self.directory, self.header, self._table, rows=rows, fingerprint=fingerprint, remote=self.remote
        )

    def with_tars(self, directory: Path) -> Manifest:
        """The same folder, the tars of which lie in a folder of this machine."""
        return Manifest(directory, self.header, self._table, rows=self._rows, fingerprint=self.fingerprint)

    def shard_N(self) -> npt.NDArray[np.int32]:  # noqa: N802
        """The shard of every row, an index of `shards`; read-only int32 [N]."""
        return self._shard_N

    def packed(self) -> Manifest:
        """The same folder with the splits that it was packed with: all that reading a row needs, and quick to send."""
        return self if self._rows is None else Manifest(self.directory, self.header, self._table, remote=self.remote)

    def label_NK(  # noqa: N802
        self, labels: Sequence[str], rows: npt.NDArray[np.integer[Any]] | None = None
    ) -> npt.NDArray[np.int8]:
        """1, 0 or -1 (unknown) for every row (or those given) and asked label; int8 [N, K].

        Raises:
            UserError: the folder has no such label.
        """
        for label in labels:
            if label not in self._label_N:
                fix = f"choose from {', '.join(self.labels)}"
                raise UserError(f"no label {label!r}", fix=fix, file=f"{self.place}/{MANIFEST_NAME}")
        label_NK = np.empty((len(self) if rows is None else len(rows), len(labels)), np.int8)
        for k, label in enumerate(labels):
            label_NK[:, k] = self._label_N[label] if rows is None else self._label_N[label][rows]
        return label_NK

    def text(self, column: str, rows: Iterable[int] | npt.NDArray[np.int64]) -> list[str]:
        """A column of texts at `rows`; the columns are those of samples.TEXT_COLUMNS."""
        assert column in samples.TEXT_COLUMNS, column
        row_M = rows if isinstance(rows, np.ndarray) else np.fromiter(rows, np.int64)
        taken = self._table.column(column).take(samples.from_numbers(row_M))
        texts: list[str] = taken.cast(pa.string()).to_pylist()
        return texts

    def location(self, row: int, *, sha256: bool = True) -> Place:
        """Where a row's image payload lies, and its checksums; SHA-256 need not be mapped where nobody compares it."""
        return Place(
            self._shard_N.item(row),
            self._offset_N.item(row),
            self._num_bytes_N.item(row),
            self._sha256_N32[row].tobytes() if sha256 else b"",
            self._xxh3_N16[row].tobytes(),
        )

    def places(self, row_M: npt.NDArray[np.int64]) -> Places:
        """The same of many rows, as arrays."""
        return Places(self._shard_N[row_M], self._offset_N[row_M], self._num_bytes_N[row_M], self._sha256_N32[row_M])


def read_manifest(directory: str | Path, options: RemoteOptions | None = None) -> Manifest:
    """Open a packed folder. samples.arrow is hashed once here (0.2 s for a million rows), not in worker processes.

    Args:
        directory: a path, or an address of any kind that fsspec knows (https://..., s3://..., gs://...).
        options: how an address is read.

    Raises:
        UserError: manifest.json or samples.arrow is missing, unreadable, of another version, not ours, or changed; an
            address cannot be reached.
    """
    path = as_path(directory)
    if path is not None:
        return _read_manifest(path, None)
    copy, remote = fetch_manifest(str(directory), options or RemoteOptions())
    with named_elsewhere(copy, remote):
        return _read_manifest(copy, remote)


def _read_manifest(directory: Path, remote: Remote | None) -> Manifest:
    header = _read_header(directory)
    path = directory / SAMPLES_NAME
    with os_errors_for_users(path):
        if not path.is_file():
            raise UserError("missing, though manifest.json names it", fix=REPACK, file=path)
        expected = header.samples["sha256"]
        if path.stat().st_size != header.samples["num_bytes"] or sha256_file(path).hex() != expected:
            raise UserError("changed since it was packed: its checksum is another", fix=REPACK, file=path)
    return _open(directory, header, remote)


def folder_format(directory: str | Path) -> str | None:
    """What manifest.json says a folder holds, in one word; None where it cannot be read.

    Raises:
        UserError: an address cannot be reached.
    """
    directory = as_path(directory) or fetch_manifest(str(directory), RemoteOptions())[0]
    try:
        content = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return str(content.get("format")) if isinstance(content, dict) else None


def check_shards(manifest: Manifest) -> None:
    """See that every tar is there with its size (of a web server's, the first and the last); contents are not read.

    Raises:
        UserError: a tar is missing, out of reach, or has another size.
    """
    if manifest.remote is not None:
        manifest.remote.check_shards(manifest.shards, REPACK)
        return
    for shard in manifest.shards:
        path = manifest.directory / shard.name
        with os_errors_for_users(path):
            if not path.is_file():
                raise UserError("missing, though manifest.json names it", fix=REPACK, file=path)
            size = path.stat().st_size
        if size != shard.num_bytes:
            what = "truncated" if size < shard.num_bytes else "longer than packed"
            raise UserError(f"{what}: {size} bytes instead of {shard.num_bytes}", fix=REPACK, file=path)


def write_manifest(directory: Path, table: pa.Table, fields: Mapping[str, Any]) -> Header:
    """Write samples.arrow, then manifest.json, each atomically: with manifest.json the folder is complete.

    Args:
        directory: where the tars lie.
        table: rows as samples.to_table gives them, all shards in order.
        fields: the fields of Header but schema_version, format and samples.
    """
    path = directory / SAMPLES_NAME
    encoded = samples.encode(table, fields["labels"])
    with atomic_file(path, needed_bytes=encoded.nbytes) as file, pa.ipc.new_file(file, encoded.schema) as writer:
        writer.write_table(encoded, max_chunksize=max(1, encoded.num_rows))
    described = {
        "name": SAMPLES_NAME,
        "num_bytes": path.stat().st_size,
        "sha256": sha256_file(path).hex(),
        "num_samples": encoded.num_rows,
    }
    header = Header(schema_version=SCHEMA_VERSION, format=FORMAT, samples=described, **fields)
    with atomic_file(directory / MANIFEST_NAME) as file:
        file.write((json.dumps(asdict(header), indent=1) + "\n").encode())
    return header


def _reopen(
    directory: Path,
    packed: str,
    rows: Mapping[str, npt.NDArray[np.int64]] | None,
    fingerprint: str,
    remote: Remote | None,
) -> Manifest:
    """What unpickling calls: map again, without hashing, and see that it is still the same data."""
    manifest = _open(directory, _read_header(directory), remote)
    if manifest.fingerprint != packed:
        raise UserError("changed while it was in use", fix="start again", file=directory / MANIFEST_NAME)
    return manifest if rows is None else manifest.with_rows(rows, fingerprint=fingerprint)


def _open(directory: Path, header: Header, remote: Remote | None) -> Manifest:
    path = directory / SAMPLES_NAME
    try:
        with pa.memory_map(str(path), "r") as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot be read ({error})", fix=REPACK, file=path) from error
    if not table.schema.equals(samples.schema(header.labels, encoded=True)) or table.num_rows == 0:
        raise UserError("its columns are not those that manifest.json names", fix=REPACK, file=path)
    return Manifest(directory, header, table, remote=remote)


@contextmanager
def os_errors_for_users(path: Path) -> Iterator[None]:
    """A file or folder that the system does not let us read is the user's to mend."""
    try:
        yield
    except OSError as error:
        fix = "see to the permissions of the file and its folder, and to the disk"
        raise UserError(f"cannot be read ({error.strerror or error})", fix=fix, file=path) from error


def _read_header(directory: Path) -> Header:
    path = directory / MANIFEST_NAME
    with os_errors_for_users(path):
        if not path.is_file():
            if (directory / WORK_FOLDER).is_dir():
                fix = "run the same `msmil pack` command again; it goes on where it stopped"
                raise UserError("packing was not finished, there is no manifest.json", fix=fix, file=directory)
            fix = "give the folder that `msmil pack` wrote (it holds manifest.json)"
            raise UserError("there is no manifest.json", fix=fix, file=directory)
        encoded = path.read_bytes()
    return parse_header(encoded, path)
