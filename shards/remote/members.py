"""Payloads of tars elsewhere, through the cache of the machine: each verified, none fetched twice. M payloads."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from shards.cache import Claim
from shards.checksums import sha256
from shards.errors import UserError
from shards.members import Called, Place

if TYPE_CHECKING:
    from shards.header import ShardInfo
    from shards.remote.folder import Remote

# Between the images of two samples lie a json and three headers: read along rather than asked around.
GAP_BYTES: Final = 1 << 14
_ROOM_EVERY_S: Final = 0.02
_TRIES: Final = 2  # a wrong byte may be the network's
_SMALL: Final = "set data.cache_gb to more, or data.cache_dir to a larger local disk"


class RemoteMembers:
    """Reads payloads of a folder elsewhere. Threads may share it.

    Args:
        remote: the folder.
        shards: its tars, by index.
        error: makes the error for users, of (shard, what is wrong, the fix or None).
    """

    def __init__(
        self, remote: Remote, shards: Sequence[ShardInfo], error: Callable[[int, str, str | None], UserError]
    ) -> None:
        self.remote = remote
        self.waits = 0  # payloads that were not in the cache when they were wanted
        self._shards = shards
        self._error = error
        self._cache = remote.cache()
        self._store = remote.store()

    def stop(self) -> None:
        """Give up what is being tried again."""
        self._store.stop()

    def payload(self, place: Place, name: Called) -> bytes:
        """The bytes at a place, whose digest is right; `name` is what the errors call them.

        Raises:
            UserError: they cannot be fetched, or are wrong again when they are fetched again.
        """
        if not self.remote.ranges:
            return self._from_shard(place, name)
        while True:
            data = self._cache.get(place.sha256)
            if data is not None:
                if place.holds(data):
                    return data
                self._cache.discard(place.sha256)  # this disk has changed it
                continue
            self.waits += 1
            claim = self._cache.claim(place.sha256, place.num_bytes, wait=True)
            if claim is None:
                continue  # another one has fetched it meanwhile
            with claim, self._disk_errors(place.shard):
                data = self._fetch_one(place, name)
                if self._cache.reserve([claim]):
                    claim.put(data)
                return data

    def fetch(self, places: Sequence[Place]) -> None:
        """Bring places of one shard, in the order of their offsets, into the cache: neighbours in one request.

        What is there, or is being fetched by another, is left out. What comes wrong is left to `payload`.

        Raises:
            UserError: the network does not answer; the disk is full.
        """
        if not self.remote.ranges:
            self._ensure_shard(places[0].shard, wait=False)
            return
        with ExitStack() as stack, self._disk_errors(places[0].shard):
            claimed: list[tuple[Place, Claim]] = []
            for place in places:
                claim = self._cache.claim(place.sha256, place.num_bytes, wait=False)
                if claim is not None:
                    claimed.append((place, stack.enter_context(claim)))
            if not claimed or not self._cache.reserve([claim for _, claim in claimed]):
                return
            for run in _neighbours(claimed):
                first, last = run[0][0], run[-1][0]
                start = first.offset_bytes
                data = self._store.read(self._shards[first.shard].name, start, last.offset_bytes + last.num_bytes)
                for place, claim in run:
                    part = data[place.offset_bytes - start :][: place.num_bytes]
                    if sha256(part) == place.sha256:
                        claim.put(part)

    def _fetch_one(self, place: Place, name: Called) -> bytes:
        start = place.offset_bytes
        for _ in range(_TRIES):
            data = self._store.read(self._shards[place.shard].name, start, start + place.num_bytes)
            if sha256(data) == place.sha256:
                return data
        thing = f"changed since it was packed: the checksum of {name} is another, {_TRIES} times in a row"
        raise self._error(place.shard, thing, None)

    def _from_shard(self, place: Place, name: Called) -> bytes:
        """The bytes at a place of a tar that is in the cache as a whole."""
        digest = bytes.fromhex(self._shards[place.shard].sha256)
        for _ in range(_TRIES):
            data = None
            while data is None:
                data = self._cache.get(digest, place.offset_bytes, place.num_bytes)
                if data is None:
                    self.waits += 1
                    self._ensure_shard(place.shard, wait=True)
            if place.holds(data):
                return data
            self._cache.discard(digest)
        raise self._error(place.shard, f"changed since it was packed: the checksum of {name} is another", None)

    def _ensure_shard(self, shard: int, *, wait: bool) -> None:
        info = self._shards[shard]
        claim = self._cache.claim(bytes.fromhex(info.sha256), info.num_bytes, wait=wait)
        if claim is None:
            return
        with claim, self._disk_errors(shard):
            limit = self._cache.limit_bytes
            if info.num_bytes > limit:
                thing = f"this shard of {info.num_bytes} bytes finds no room in the cache of {limit} bytes"
                raise self._error(shard, thing, _SMALL)
            while not self._cache.reserve([claim]):
                if not wait:
                    return
                time.sleep(_ROOM_EVERY_S)  # those that are being fetched take all of it, and give it back
            with os.fdopen(os.dup(claim.descriptor), "r+b") as file:
                for _ in range(_TRIES):
                    self._store.download(info.name, file, info.num_bytes, ranges=False)
                    file.flush()
                    file.seek(0)
                    if hashlib.file_digest(file, "sha256").hexdigest() == info.sha256:
                        claim.publish()
                        return
        thing = f"changed since it was packed: its checksum is another, {_TRIES} times in a row"
        raise self._error(shard, thing, None)

    @contextmanager
    def _disk_errors(self, shard: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            thing = f"cannot be written into the cache ({error.strerror or error})"
            raise self._error(shard, thing, _SMALL) from error


def _neighbours(claimed: Sequence[tuple[Place, Claim]]) -> Iterator[list[tuple[Place, Claim]]]:
    """Pieces that are read in one request: little lies between them."""
    run: list[tuple[Place, Claim]] = []
    for place, claim in claimed:
        if run:
            before = run[-1][0]
            if place.offset_bytes - before.offset_bytes - before.num_bytes > GAP_BYTES:
                yield run
                run = []
        run.append((place, claim))
    if run:
        yield run
