"""A folder of images and a CSV file: the way in for every archive that has no source of its own.

Columns of the table: image (path below the folder), patient_id, laterality (L/R), view (CC/MLO), and one column per
label with 1, 0 or nothing (unknown). Optional: image_id (else the path without its ending), exam_id (else the
patient), split (training, validation, test; else training), fold, manufacturer, density, birads. Columns that are
neither are labels, unless labels are named. Boxes are a second table: image, label, x0, y0, x1, y1 in pixels of the
image file, x1 and y1 exclusive.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from shards.errors import UserError
from shards.sources.base import Archive, SourceRow, upright
from shards.sources.table import (
    Table,
    check_columns,
    parse_coordinate,
    parse_fold,
    parse_label,
    parse_laterality,
    parse_required,
    parse_split,
    parse_view,
    read_table,
)
from shards.types import Box, Split

_REQUIRED: Final = ("image", "patient_id", "laterality", "view")
_OPTIONAL: Final = ("image_id", "exam_id", "split", "fold", "manufacturer", "density", "birads")
_BOX_COLUMNS: Final = ("image", "label", "x0", "y0", "x1", "y1")


def read_image_folder(
    file: Path, images: Path, *, labels: Sequence[str] | None = None, boxes: Path | None = None
) -> Archive:
    """Read a table of images.

    Args:
        file: the CSV file.
        images: the folder that its paths are below.
        labels: the columns that are labels; by default all that have no other meaning.
        boxes: a CSV file of boxes.

    Raises:
        UserError: a column is missing, a cell is not what it should be, or an image comes twice.
    """
    table = read_table(file, required=_REQUIRED, id_column="image")
    offered = _label_columns(table, labels)
    paths = table.parsed("image", parse_required)
    table.check_unique("image", paths)
    image_ids = [str(PurePosixPath(path).with_suffix("")) for path in paths]
    id_column = "image"
    if "image_id" in table.columns:
        id_column, image_ids = "image_id", table.parsed("image_id", parse_required)
    table.check_unique(id_column, image_ids)
    patients = table.parsed("patient_id", parse_required)
    exams = table.parsed("exam_id", parse_required) if "exam_id" in table.columns else patients
    default: list[Split] = ["train"] * len(table)
    splits = table.parsed("split", parse_split) if "split" in table.columns else default
    folds = table.parsed("fold", parse_fold) if "fold" in table.columns else [-1] * len(table)
    sides, views = table.parsed("laterality", parse_laterality), table.parsed("view", parse_view)
    columns = {label: table.parsed(label, parse_label) for label in offered}
    makers, densities, birads = (table.texts_or_empty(name) for name in ("manufacturer", "density", "birads"))
    row_of_image = {path: row for row, path in enumerate(paths)}
    notes: Counter[str] = Counter()
    boxes_of_row = _read_boxes(boxes, row_of_image, columns) if boxes is not None else {}
    rows = [
        SourceRow(
            image_path=images / paths[i],
            image_id=image_ids[i],
            exam_id=exams[i],
            patient_id=patients[i],
            laterality=sides[i],
            view=views[i],
            split=splits[i],
            fold=folds[i],
            labels={label: values[i] for label, values in columns.items()},
            boxes=upright(boxes_of_row.get(i, []), notes),
            manufacturer=makers[i],
            density=densities[i],
            birads=birads[i],
        )
        for i in range(len(table))
    ]
    return Archive(file=file, name=file.stem, labels=offered, rows=rows, notes=notes)


def _label_columns(table: Table, labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels is not None:
        check_columns(table.file, table.columns, labels)
        return tuple(labels)
    offered = tuple(name for name in table.columns if name not in (*_REQUIRED, *_OPTIONAL))
    if not offered:
        fix = "add a column per label with 1, 0 or nothing (unknown)"
        raise UserError("the table has no label column", fix=fix, file=table.file)
    return offered


def _read_boxes(file: Path, row_of_image: dict[str, int], columns: dict[str, list[int]]) -> dict[int, list[Box]]:
    """Boxes by row of the image table."""
    table = read_table(file, required=_BOX_COLUMNS, id_column="image")
    corners = [table.parsed(name, parse_coordinate) for name in ("x0", "y0", "x1", "y1")]
    boxes: dict[int, list[Box]] = {}
    for row, (image, label) in enumerate(zip(table.texts("image"), table.texts("label"), strict=True)):
        if image not in row_of_image:
            raise table.error(row, "image", "is not an image of the table", fix="write the path as the table has it")
        if label not in columns:
            near = difflib.get_close_matches(label, columns, n=1) or sorted(columns)
            raise table.error(row, "label", "is no label of the table", fix=f"use a label, such as {', '.join(near)}")
        image_row = row_of_image[image]
        if columns[label][image_row] == 0:
            what = f"has a box on {image}, for which the table says 0"
            raise table.error(row, "label", what, fix="correct the label or leave the box out")
        x0, y0, x1, y1 = (values[row] for values in corners)
        boxes.setdefault(image_row, []).append(Box(label=label, x0=x0, y0=y0, x1=x1, y1=y1))
    return boxes
