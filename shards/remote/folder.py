"""A packed folder elsewhere: its manifest, copied once per machine, and how its tars are reached."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shards.cache import LEFT, Cache
from shards.errors import UserError
from shards.files import atomic_file, free_bytes, human_bytes, sha256_file
from shards.remote.store import Store
from shards.remote.url import check_url

if TYPE_CHECKING:
    from shards.header import ShardInfo

MANIFEST_NAME: Final = "manifest.json"
# Batches that a cache has to hold: one is used, and of the coming ones none may be evicted before it is.
LEAST_BATCHES: Final = 8
_CURRENT: Final = "current.json"
_BYTES_PER_GB: Final = 10**9
_MORE_ROOM: Final = "lower data.cache_gb, or set data.cache_dir to a larger local disk"
_AGAIN: Final = "copy the folder there again from where it is whole"
# What tells two versions of a file apart, as servers and stores call it.
_VALIDATORS: Final = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "generation", "md5Hash")


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How folders elsewhere are read.

    cache_dir: folder on a disk of this machine; empty: one of this user where temporary files go. cache_gb: what the
    images in it may take. timeout_s: how long a request may stall. retries: how often it is made again.
    """

    cache_dir: str = ""
    cache_gb: float = 20.0
    timeout_s: float = 30.0
    retries: int = 5

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        if self.cache_dir:
            return Path(self.cache_dir).absolute()
        return Path(tempfile.gettempdir()) / f"msmil-cache-{os.getuid()}"

    @property
    def limit_bytes(self) -> int:
        """The bound of the cache."""
        return int(self.cache_gb * _BYTES_PER_GB)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A folder elsewhere, opened; it travels to decoding processes. ranges: whether parts of its files can be read."""

    url: str
    options: RemoteOptions
    ranges: bool

    def cache(self) -> Cache:
        """The cache of this machine."""
        return Cache(self.options.folder, self.options.limit_bytes)

    def store(self) -> Store:
        """A connection of one's own."""
        return Store(self.url, timeout_s=self.options.timeout_s, retries=self.options.retries)

    def check_room(self, batch_bytes: float) -> None:
        """See that the cache holds some batches of all ranks of this machine, or it would evict what is coming.

        Raises:
            UserError: it is too small.
        """
        if batch_bytes * LEAST_BATCHES > self.options.limit_bytes:
            needed, limit = (human_bytes(int(n)) for n in (batch_bytes * LEAST_BATCHES, self.options.limit_bytes))
            thing = f"the cache of {limit} does not hold the {LEAST_BATCHES} batches ({needed}) that it has to"
            raise UserError(thing, fix="set data.cache_gb to more", file=self.options.folder)

    def check_whole(self, sizes: Sequence[int], together: int) -> None:
        """See that the cache holds so many whole tars at a time, or each would be downloaded again and again.

        Args:
            sizes: bytes of all tars that are read, the largest first.
            together: how many are read at a time.

        Raises:
            UserError: it is too small.
        """
        # an eviction makes room for one more, and then some
        needed_bytes = sum(sizes[: together + 1]) / LEFT
        if needed_bytes > self.options.limit_bytes:
            needed, limit = (human_bytes(int(n)) for n in (needed_bytes, self.options.limit_bytes))
            thing = "the server refuses ranges, so whole shards are downloaded: "
            thing += f"the cache of {limit} does not hold the {together} that are read at a time ({needed} are needed)"
            enough_gb = math.ceil(needed_bytes / _BYTES_PER_GB * 10) / 10
            raise UserError(thing, fix=f"set data.cache_gb to {enough_gb:g} or more", file=self.options.folder)

    def check_disk(self) -> None:
        """See that the cache may grow to its bound.

        Raises:
            UserError: the disk is too small for it.
        """
        folder, limit_bytes = self.options.folder, self.options.limit_bytes
        with _os_errors_for_users(folder):
            free = free_bytes(folder)
            missing = limit_bytes - self.cache().held_bytes() - free
        if missing > 0:
            thing = f"the cache may grow to {human_bytes(limit_bytes)}, but {human_bytes(free)} are free here"
            raise UserError(thing, fix=_MORE_ROOM, file=folder)

    def check_shards(self, shards: Sequence[ShardInfo], fix: str) -> None:
        """See that tars are there with their size: all of them in a store that lists its files; of a web server
        the first and the last, the others being checked when they are read.

        Raises:
            UserError: a tar is missing, out of reach, or has another size.
        """
        store = self.store()
        sizes: dict[str, Any] | None = store.sizes()
        if sizes is None:
            ends = {shards[0].name, shards[-1].name}
            sizes = {name: store.info(name)["size"] for name in ends}
            shards = [shard for shard in shards if shard.name in ends]
        for shard in shards:
            file = f"{self.url}/{shard.name}"
            if shard.name not in sizes:
                raise UserError("missing, though manifest.json names it", fix=fix, file=file)
            size = sizes[shard.name]
            if size is not None and size != shard.num_bytes:
                what = "truncated" if size < shard.num_bytes else "longer than packed"
                raise UserError(f"{what}: {size} bytes instead of {shard.num_bytes}", fix=fix, file=file)

    def __str__(self) -> str:
        how = "" if self.ranges else "; the server refuses ranges, so whole shards are downloaded"
        options = self.options
        return f"{self.url}, read through {options.folder} (at most {human_bytes(options.limit_bytes)}){how}"


def fetch_manifest(url: str, options: RemoteOptions) -> tuple[Path, Remote]:
    """A folder of this machine with manifest.json and the table beside it, copied unless they are there already.

    One process of a machine fetches while the others wait. Whether the copy is the newest is asked each time.

    Raises:
        UserError: credentials in the address; files that are not there, cannot be reached, or are not whole; a cache
            that cannot be written or for which there is no room.
    """
    check_url(url, "the address of the shards")
    url = url.rstrip("/")
    folder = options.folder / "manifests" / hashlib.sha256(url.encode()).hexdigest()[:16]
    store = Store(url, timeout_s=options.timeout_s, retries=options.retries)
    with _os_errors_for_users(folder), _locked(folder):
        _check_owner(options.folder)
        version = _version(store)
        current = _read(folder / _CURRENT)
        if current is None or current["version"] != version or version is None:
            current = _fetch(store, folder) | {"version": version}
            with atomic_file(folder / _CURRENT) as file:
                file.write(json.dumps(current).encode())
    return folder / current["copy"], Remote(url=url, options=options, ranges=current["ranges"])


@contextmanager
def named_elsewhere(copy: Path, remote: Remote) -> Iterator[None]:
    """Let errors about this machine's copy of a file name the file itself."""
    try:
        yield
    except UserError as error:
        file = error.file
        if file is not None and Path(file).is_relative_to(copy):
            file = f"{remote.url}/{Path(file).relative_to(copy)}".removesuffix("/.")
        raise UserError(error.thing, fix=error.fix, file=file) from error


def _fetch(store: Store, folder: Path) -> dict[str, Any]:
    """Copy the manifest and its table into a folder of their own, manifest.json last; what is whole is kept."""
    content = store.read(MANIFEST_NAME)
    copy = folder / hashlib.sha256(content).hexdigest()[:16]
    found: dict[str, Any] = {"copy": copy.name, "ranges": store.serves_ranges(MANIFEST_NAME, content)}
    if (copy / MANIFEST_NAME).exists():
        return found
    copy.mkdir(exist_ok=True, mode=0o700)
    table = _table(content)
    if table is not None:
        _fetch_table(store, copy / table["name"], int(table["num_bytes"]), str(table["sha256"]), found["ranges"])
    with atomic_file(copy / MANIFEST_NAME) as file:
        file.write(content)
    return found


def _table(content: bytes) -> dict[str, Any] | None:
    """Name, size and digest of the table that a manifest names; None where it is no manifest, as its reader says."""
    try:
        header = json.loads(content)
        table = header.get("samples") or header.get("rows")
        whole = {"name", "num_bytes", "sha256"} <= table.keys() and "/" not in table["name"]
    except (ValueError, TypeError, AttributeError):
        return None
    return dict(table) if whole else None


def _fetch_table(store: Store, path: Path, num_bytes: int, sha256: str, ranges: bool) -> None:
    name = path.name
    for _ in range(2):  # a wrong byte may be the network's
        with atomic_file(path, needed_bytes=num_bytes) as file:
            store.download(name, file, num_bytes, ranges=ranges)
        if sha256_file(path).hex() == sha256:
            return
    path.unlink()
    thing = "changed since it was packed: its checksum is another, twice in a row"
    raise UserError(thing, fix=_AGAIN, file=f"{store.url}/{name}")


def _version(store: Store) -> dict[str, str] | None:
    """What tells this manifest.json from a later one; None where the server does not say."""
    try:
        info = store.info(MANIFEST_NAME)
    except UserError as error:
        if error.thing != "missing":
            raise
        fix = "give the address of the folder that `msmil pack` wrote (it holds manifest.json)"
        raise UserError("there is no manifest.json", fix=fix, file=store.url) from error
    told = {key: str(info[key]) for key in _VALIDATORS if info.get(key) is not None}
    return {"size": str(info.get("size")), **told} if told else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    there = (path.parent / content["copy"] / MANIFEST_NAME).exists()
    return content if there else None


def _check_owner(folder: Path) -> None:
    """What another user has put there, in a folder for temporary files, must not be taken for a manifest."""
    if folder.stat().st_uid != os.getuid():
        raise UserError("this cache belongs to another user", fix="set data.cache_dir to another folder", file=folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _os_errors_for_users(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "see to its permissions and its disk, or set data.cache_dir to another folder"
        raise UserError(f"the cache cannot be used ({error.strerror or error})", fix=fix, file=folder) from error
