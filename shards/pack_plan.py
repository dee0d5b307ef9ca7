"""What goes into which shard: a pure function of the archive and the options, never of the number of processes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from shards.codecs import Codec
from shards.errors import UserError
from shards.header import SCHEMA_VERSION
from shards.images import BrokenImageError, check_file
from shards.pack_shard import sample_key
from shards.recipes import Recipe
from shards.sources.base import Archive, SourceRow
from shards.splits import Validation, assign_validation, draw
from shards.types import SPLITS

_STAT_THREADS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What `pack` is asked for, beside the archive.

    samples_per_shard: a split is cut into tars of at most so many images, of nearly equal length;
    seed: of the validation split and of the order of exams; drop_broken: leave broken images out instead of stopping.
    """

    recipe: Recipe
    codec: Codec
    labels: tuple[str, ...]
    validation: Validation
    seed: int
    samples_per_shard: int
    drop_broken: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Shards in order, each with its rows.

    file_bytes: sizes of the image files of each shard; missing: images as (image_id, reason); settings: all that was
    asked for, readable; begun: the same without the sizes, since an image may be mended when packing goes on.
    """

    shards: list[list[SourceRow]]
    file_bytes: list[list[int]]
    missing: list[tuple[str, str]]
    settings: dict[str, Any]
    begun: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of `begun`."""
        return hashlib.sha256(json.dumps([SCHEMA_VERSION, self.begun], sort_keys=True).encode()).hexdigest()


def make_plan(archive: Archive, options: PackOptions) -> PackPlan:
    """Decide splits and shards, and see that every image file is there.

    Raises:
        UserError: an unknown label, no image, a patient in two splits, or (BrokenImageError) a file missing or empty.
    """
    _check_options(archive, options)
    _check_unique(archive)
    wanted = set(options.labels)
    rows = assign_validation(
        archive.rows, options.validation, labels=options.labels, seed=options.seed, file=archive.file
    )
    rows = [replace(row, boxes=tuple(box for box in row.boxes if box.label in wanted)) for row in rows]
    sizes, missing = _check_files(rows, options.drop_broken)
    present = [row for row in rows if row.image_id in sizes]
    if not present:
        raise UserError("no image of the table is there", fix="check the folder given with --images", file=archive.file)
    settings = {
        "archive": archive.name,
        "recipe": {**options.recipe.describe(), "size_px": options.recipe.size()},
        "codec": options.codec,
        "labels": list(options.labels),
        "validation_fraction": options.validation.fraction,
        "validation_fold": options.validation.fold,
        "seed": options.seed,
        "samples_per_shard": options.samples_per_shard,
    }
    settings = json.loads(json.dumps(settings))
    shards = cut(present, seed=options.seed, samples_per_shard=options.samples_per_shard)
    return PackPlan(
        shards=shards,
        file_bytes=[[sizes[row.image_id] for row in shard] for shard in shards],
        missing=missing,
        settings={**settings, "table_and_images": _digest_rows(present, options.labels, sizes)},
        begun={**settings, "table": _digest_rows(present, options.labels, {})},
    )


def cut(rows: Sequence[SourceRow], *, seed: int, samples_per_shard: int) -> list[list[SourceRow]]:
    """Rows as shards: one split after the other, exams in a random order, images of an exam side by side.

    A shard holds one split only, so that whoever reads the tars alone can choose; any run of a split's shards is a
    random draw of its exams. Shards of a split differ by at most one image.
    """
    shards = []
    for split in SPLITS:
        of_split = [row for row in rows if row.split == split]
        of_split.sort(key=lambda row: (draw(seed, "order", row.exam_id), row.exam_id, row.image_id))
        count = -(-len(of_split) // samples_per_shard)
        bounds = [len(of_split) * i // count for i in range(count + 1)] if count else []
        shards += [of_split[start:stop] for start, stop in pairwise(bounds)]
    return shards


def _check_options(archive: Archive, options: PackOptions) -> None:
    if options.samples_per_shard < 1:
        raise UserError(f"{options.samples_per_shard} samples per shard", fix="give at least 1 (--samples-per-shard)")
    if not options.labels or len(set(options.labels)) < len(options.labels):
        raise UserError(f"the labels {list(options.labels)}", fix="name at least one label, each once")
    for label in options.labels:
        if label not in archive.labels:
            near = difflib.get_close_matches(label, archive.labels, n=3) or list(archive.labels)
            raise UserError(f"no label {label!r}", fix=f"use {', '.join(near)} with --labels", file=archive.file)
    if not archive.rows:
        raise UserError("the archive holds no image", fix="give a table with a row per image", file=archive.file)


def _check_unique(archive: Archive) -> None:
    """Refuse two images of one name, in the table or in the tars."""
    image_of_key: dict[str, str] = {}
    for number, row in enumerate(archive.rows, 1):
        key = sample_key(row.image_id)
        if key in image_of_key:
            thing = f"row {number}: image_id {row.image_id} comes twice (as {image_of_key[key]} before)"
            raise UserError(thing, fix="keep one row per image", file=archive.file)
        image_of_key[key] = row.image_id


def _check_files(rows: Sequence[SourceRow], drop_broken: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Sizes in bytes by image id, and images whose file is missing or empty; before hours of packing, not after."""

    def check(row: SourceRow) -> int | BrokenImageError:
        try:
            return check_file(row.image_path)
        except BrokenImageError as error:
            return error

    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        found = list(threads.map(check, rows))
    sizes = {row.image_id: size for row, size in zip(rows, found, strict=True) if isinstance(size, int)}
    broken = [(row, error) for row, error in zip(rows, found, strict=True) if isinstance(error, BrokenImageError)]
    if broken and not drop_broken:
        first = broken[0][1]
        more = f" (and {len(broken) - 1} more of {len(rows)} are missing or empty)" if len(broken) > 1 else ""
        assert first.file is not None
        raise BrokenImageError(first.reason, first.thing + more, fix=first.fix, file=Path(first.file))
    return sizes, [(row.image_id, error.reason) for row, error in broken]


def _digest_rows(rows: Sequence[SourceRow], labels: Sequence[str], sizes: dict[str, int]) -> str:
    """Everything about the rows that ends up in the shards, and the sizes of their files; not paths, not the order."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.image_id):
        told = [row.image_id, row.exam_id, row.patient_id, row.laterality, row.view, row.split, row.fold]
        told += [row.manufacturer, row.density, row.birads, sizes.get(row.image_id)]
        told += [[row.labels[label] for label in labels]]
        told += [[[box.label, box.x0, box.y0, box.x1, box.y1] for box in row.boxes]]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()
