"""Features of one image: read by offset from their tar, checked against the manifest, decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.feature_codec import decode
from shards.features import AGAIN, Features
from shards.members import Called, MemberReader, Places
from shards.remote.coming import Coming


class FeatureReader(MemberReader):
    """Reads the features of images; a context manager that closes its files."""

    def __init__(self, features: Features, coming: Coming | None = None, *, all_checksums: bool = False) -> None:
        super().__init__(
            features.directory,
            features.shards,
            made="extracted",
            fix=AGAIN,
            remote=features.remote,
            coming=coming,
            all_checksums=all_checksums,
        )
        self.features = features

    def read(self, row: int) -> dict[int, Any]:
        """{level: tensor of the shape and type that the manifest says}; the checksum is checked every time.

        Raises:
            UserError: the tar is missing, unreadable, truncated or changed, or the features are not as promised.
        """
        features = self.features
        place, name = features.place(row), Called(self._name, row)
        data = self._payload(place, name, lasting=True)
        header = features.header
        try:
            return decode(data, features.levels, header.dtype, zstd=header.zstd, name=name)
        except UserError as error:
            raise self._error(place.shard, error.thing, error.fix) from error

    def _name(self, row: int) -> str:
        return f"sample {self.features.key(row)} (row {row})"

    def _places(self, row_M: npt.NDArray[np.int64]) -> Places:
        return self.features.places(row_M)
