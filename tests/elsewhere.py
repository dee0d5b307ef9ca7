"""A packed folder to be served, and what of it a server has sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.manifest import Manifest, read_manifest
from shards.remote.members import GAP_BYTES
from tests.archives import make_grouped_archive, pack_grouped
from tests.servers import FileServer


def pack_large(folder: Path) -> Path:
    """Like `packed`, with images so large that a request does not read over one that is not asked for."""
    pack_grouped(make_grouped_archive(folder / "archive", exams=24, hw=(224, 160)), folder / "shards")
    assert read_manifest(folder / "shards").places(np.arange(96)).num_bytes_M.min() > GAP_BYTES
    return folder / "shards"


def times_sent(manifest: Manifest, server: FileServer) -> np.ndarray:
    """How often each sample of the folder was sent, as a whole."""
    places = manifest.places(np.arange(len(manifest)))
    times_N = np.zeros(len(manifest), np.int64)
    for sent in server.gets():
        of_shard = [shard.name for shard in manifest.shards].index(sent.name) == places.shard_M
        end_N = places.offset_M + places.num_bytes_M
        times_N += of_shard & (places.offset_M >= sent.start) & (end_N <= sent.start + sent.num_bytes)
    return times_N


def only(manifest: Manifest, row_M: np.ndarray) -> list[int]:
    """Once for these rows, never for the others."""
    return np.isin(np.arange(len(manifest)), row_M).astype(int).tolist()
