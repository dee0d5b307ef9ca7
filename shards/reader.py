"""Pixels of one sample: read by offset from its tar, checked against the manifest, decoded. H W pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shards.codecs import Pixels, decode, decode_into
from shards.errors import UserError
from shards.manifest import Manifest
from shards.members import Called, MemberReader, Places
from shards.remote.coming import Coming

_Decoded = TypeVar("_Decoded", Pixels, None)


class ShardReader(MemberReader):
    """Reads samples of a packed folder."""

    def __init__(self, manifest: Manifest, coming: Coming | None = None, *, all_checksums: bool = False) -> None:
        super().__init__(
            manifest.directory,
            manifest.shards,
            made="packed",
            fix=f"run `msmil verify {manifest.place}` to see what is broken, then copy the folder or pack it again",
            remote=manifest.remote,
            coming=coming,
            all_checksums=all_checksums,
        )
        self.manifest = manifest
        self._size_hw = (manifest.height_px, manifest.width_px)
        self._dtype = np.dtype(manifest.dtype)

    def read(self, row: int) -> Pixels:
        """The image of a manifest row, [H, W] of the manifest's size and type; its checksum is checked every time.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed, or the image is not as the manifest says.
        """
        return self._decoded(row, decode)

    def read_into(self, room_R: npt.NDArray[np.uint8], row: int) -> None:
        """The same into memory that is there: LEAD_BYTES bytes that are left as they were, then the pixels."""
        self._decoded(row, functools.partial(decode_into, room_R))

    def _decoded(self, row: int, how: Callable[..., _Decoded]) -> _Decoded:
        place = self.manifest.location(row, sha256=self._wants_sha256)
        name = Called(self._name, row)
        data = self._payload(place, name, lasting=False)
        try:
            return how(data, self.manifest.codec, expect_hw=self._size_hw, dtype=self._dtype, name=name)
        except UserError as error:
            raise self._error(place.shard, error.thing, error.fix) from error

    def _places(self, row_M: npt.NDArray[np.int64]) -> Places:
        return self.manifest.places(row_M)

    def _name(self, row: int) -> str:
        return f"sample {self.manifest.text('image_id', [row])[0]} (row {row})"
