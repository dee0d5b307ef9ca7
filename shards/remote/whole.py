"""A whole tar from elsewhere, for what reads all of it once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from shards.features import Features
    from shards.manifest import Manifest

Folder = TypeVar("Folder", "Manifest", "Features")


@contextmanager
def tars_here(folder: Folder, shard: int) -> Iterator[Folder]:
    """The folder, with one of its tars on this machine: downloaded, and removed afterwards, where it lies elsewhere.

    Raises:
        UserError: it cannot be downloaded.
    """
    if folder.remote is None:
        yield folder
        return
    info = folder.shards[shard]
    with tempfile.TemporaryDirectory(prefix="msmil-") as directory:
        path = Path(directory) / info.name
        with path.open("w+b") as file:
            folder.remote.store().download(info.name, file, info.num_bytes, ranges=folder.remote.ranges)
        yield folder.with_tars(path.parent)
