"""Pixels of one sample: read by offset from its tar, checked against the manifest, decoded. H W pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.codecs import CODECS, Pixels, decode
from shards.errors import UserError
from shards.manifest import Manifest
from shards.members import Called, MemberReader, Place, Places
from shards.remote.coming import Coming


class ShardReader(MemberReader):
    """Reads samples of a packed folder."""

    def __init__(self, manifest: Manifest, coming: Coming | None = None) -> None:
        super().__init__(
            manifest.directory,
            manifest.shards,
            made="packed",
            fix=f"run `msmil verify {manifest.place}` to see what is broken, then copy the folder or pack it again",
            remote=manifest.remote,
            coming=coming,
        )
        self.manifest = manifest

    def read(self, row: int) -> Pixels:
        """The image of a manifest row, [H, W] of the manifest's size and type; its SHA-256 is checked every time.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed, or the image is not as the manifest says.
        """
        place, name = Place(*self.manifest.location(row)), Called(lambda: self._name(row))
        data = self._payload(place, name)
        codec = self.manifest.codec
        assert codec in CODECS
        size = (self.manifest.height_px, self.manifest.width_px)
        try:
            return decode(data, codec, expect_hw=size, dtype=self.manifest.dtype, name=name)
        except UserError as error:
            raise self._error(place.shard, error.thing, error.fix) from error

    def _places(self, row_M: npt.NDArray[np.int64]) -> Places:
        return self.manifest.places(row_M)

    def _name(self, row: int) -> str:
        return f"sample {self.manifest.text('image_id', [row])[0]} (row {row})"
