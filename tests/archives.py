"""Small archives for tests, in the layouts that users have, and ways to break them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.codecs import Pixels, decode
from shards.manifest import Manifest
from shards.pack import pack
from shards.pack_report import PackReport
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table

LABELS = ("Mass", "Suspicious_Calcification")
VIEWS = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO"))
COLUMNS = (
    "image_id",
    "patient_id",
    "laterality",
    "view",
    "finding_categories",
    "finding_birads",
    "breast_birads",
    "breast_density",
    "split",
    "fold",
    "Mass",
    "Suspicious_Calcification",
    "resized_xmin",
    "resized_ymin",
    "resized_xmax",
    "resized_ymax",
)


@dataclass(frozen=True)
class GroupedArchive:
    """Where a grouped archive lies, and the cells of its table."""

    table: Path
    images: Path
    rows: list[dict[str, str]]

    def path(self, row: int) -> Path:
        """The image file of a row."""
        cells = self.rows[row]
        return self.images / cells["patient_id"] / f"{cells['image_id']}.png"

    def write_table(self) -> None:
        """Write `rows` to the table, after a test has changed them."""
        write_csv(self.table, self.rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the columns of the first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(rng: np.random.Generator, hw: tuple[int, int], dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """A breast-like half disc with noise, at the left border, between black columns at the right and black rows."""
    height, width = hw
    y, x = np.mgrid[:height, :width]
    inside = (x / (0.8 * width)) ** 2 + ((y - height / 2) / (0.45 * height)) ** 2 < 1
    value = inside * (0.4 + 0.4 * rng.random(hw))
    image: np.ndarray[Any, Any] = (value * np.iinfo(dtype).max).astype(dtype)
    return image


def add_lesion(image_HW: np.ndarray[Any, Any], box: tuple[int, int, int, int], label: str) -> None:
    """Brighten a box: all of it for a mass, every third pixel for calcifications."""
    x0, y0, x1, y1 = box
    step = 1 if label == "Mass" else 3
    image_HW[y0:y1:step, x0:x1:step] = np.iinfo(image_HW.dtype).max


def make_grouped_archive(
    folder: Path,
    *,
    exams: int = 24,
    hw: tuple[int, int] = (64, 48),
    seed: int = 0,
    dtype: Any = np.uint8,
    test_share: float = 0.25,
) -> GroupedArchive:
    """Write exams of four views in the published grouped layout, with visible lesions and their boxes.

    The first exams train, the last share of them tests; folds 0-3 go round over the training exams. About a third of
    the breasts is positive for each label, both views of a breast alike.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images_png"
    rows: list[dict[str, str]] = []
    for exam in range(exams):
        patient = f"{seed:02x}{exam:06x}exam"
        (images / patient).mkdir(parents=True)
        positive = {side: [label for label in LABELS if rng.random() < 0.35] for side in "LR"}
        for side, view in VIEWS:
            image_HW = picture(rng, hw, dtype)
            boxes = [_place(rng, hw) for _ in positive[side]]
            for label, box in zip(positive[side], boxes, strict=True):
                add_lesion(image_HW, box, label)
            image_id = f"{patient}{side}{view}".lower()
            Image.fromarray(image_HW).save(images / patient / f"{image_id}.png")
            is_test = exam >= round(exams * (1 - test_share))
            rows.append(_cells(image_id, patient, side, view, positive[side], boxes, is_test, exam % 4))
    archive = GroupedArchive(table=folder / "vindrmammo_grouped_df.csv", images=images, rows=rows)
    archive.write_table()
    return archive


def _place(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[int, int, int, int]:
    height, width = hw
    side = max(4, width // 6)
    x0 = int(rng.integers(0, max(1, width // 2 - side)))
    y0 = int(rng.integers(height // 3, max(height // 3 + 1, 2 * height // 3 - side)))
    return x0, y0, x0 + side, y0 + side


def _cells(
    image_id: str,
    patient: str,
    side: str,
    view: str,
    labels: Sequence[str],
    boxes: Sequence[tuple[int, int, int, int]],
    is_test: bool,
    fold: int,
) -> dict[str, str]:
    findings = [str([label.replace("_", " ")]) for label in labels] or [str(["No Finding"])]
    corners = [str([float(box[i]) for box in boxes] or [0.0]) for i in range(4)]
    cells = (
        image_id, patient, side, view, json.dumps(findings), json.dumps(["BI-RADS 4"] * len(findings)),
        "BI-RADS 4" if labels else "BI-RADS 1", "DENSITY C", "test" if is_test else "training", str(fold),
        str(int("Mass" in labels)), str(int("Suspicious_Calcification" in labels)), *corners,
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


def pack_grouped(archive: GroupedArchive, out: Path, **options: Any) -> PackReport:
    """Pack as the tests mostly want it: as it is, two labels, five images to a tar, in this process."""
    defaults: dict[str, Any] = {
        "recipe": AsIs(),
        "labels": LABELS,
        "samples_per_shard": 5,
        "processes": 1,
        "quiet": True,
    }
    return pack(read_grouped_table(archive.table, archive.images), out, **defaults | options)


def stored_image(manifest: Manifest, row: int) -> Pixels:
    """The pixels of a row, found by the manifest alone."""
    shard, offset, num_bytes, *_ = manifest.location(row)
    data = (manifest.directory / manifest.shards[shard].name).read_bytes()[offset : offset + num_bytes]
    codec: Any = manifest.codec
    size = (manifest.height_px, manifest.width_px)
    return decode(data, codec, expect_hw=size, dtype=manifest.dtype, name=str(row))


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
