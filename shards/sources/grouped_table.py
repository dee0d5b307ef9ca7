"""The published "grouped" table of VinDr-Mammo: one row per image, PNG files in a folder per exam.

Columns: image_id (with or without ".png"), patient_id (the exam), laterality, view, finding_categories (a JSON list of
texts of python lists, one per finding), split, Mass, Suspicious_Calcification, resized_xmin/ymin/xmax/ymax (texts of
lists, one number per finding, "[0.0]" where there is none); optional: fold, breast_birads, breast_density.
The boxes are taken as the table has them, inverted corners swapped.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Final

from shards.sources.base import Archive, SourceRow, upright
from shards.sources.table import (
    Table,
    parse_coordinate,
    parse_fold,
    parse_label,
    parse_laterality,
    parse_required,
    parse_split,
    parse_view,
    read_table,
)
from shards.types import Box

CATEGORIES: Final = (
    "Mass",
    "Suspicious Calcification",
    "Focal Asymmetry",
    "Architectural Distortion",
    "Asymmetry",
    "Suspicious Lymph Node",
    "Skin Thickening",
    "Nipple Retraction",
    "Global Asymmetry",
    "Skin Retraction",
)
NO_FINDING: Final = "No Finding"
LABELS: Final = tuple(name.replace(" ", "_") for name in CATEGORIES)
_OWN_COLUMN: Final = ("Mass", "Suspicious_Calcification")
_BOX_COLUMNS: Final = ("resized_xmin", "resized_ymin", "resized_xmax", "resized_ymax")
_REQUIRED: Final = (
    "image_id",
    "patient_id",
    "laterality",
    "view",
    "finding_categories",
    "split",
    *_OWN_COLUMN,
    *_BOX_COLUMNS,
)


def read_grouped_table(file: Path, images: Path) -> Archive:
    """Read the grouped table.

    Args:
        file: the CSV file (vindrmammo_grouped_df.csv).
        images: the folder with images/<patient_id>/<image_id>.png.

    Raises:
        UserError: a column is missing, a cell is not what it should be, an image comes twice, or the columns Mass and
            Suspicious_Calcification disagree with the finding categories.
    """
    table = read_table(file, required=_REQUIRED, id_column="image_id")
    image_ids = [text.removesuffix(".png") for text in table.parsed("image_id", parse_required)]
    table.check_unique("image_id", image_ids)
    findings = table.parsed("finding_categories", parse_findings)
    labels = _labels(table, findings)
    notes: Counter[str] = Counter()
    boxes = _boxes(table, findings, notes)
    patients = table.parsed("patient_id", parse_required)
    sides = table.parsed("laterality", parse_laterality)
    views = table.parsed("view", parse_view)
    splits = table.parsed("split", parse_split)
    folds = table.parsed("fold", parse_fold) if "fold" in table.columns else [-1] * len(table)
    densities, birads = table.texts_or_empty("breast_density"), table.texts_or_empty("breast_birads")
    rows = [
        SourceRow(
            image_path=images / patients[i] / f"{image_ids[i]}.png",
            image_id=image_ids[i],
            exam_id=patients[i],
            patient_id=patients[i],
            laterality=sides[i],
            view=views[i],
            split=splits[i],
            fold=folds[i],
            labels=labels[i],
            boxes=boxes[i],
            manufacturer="",
            density=densities[i],
            birads=birads[i],
        )
        for i in range(len(table))
    ]
    return Archive(file=file, name=file.stem, labels=LABELS, rows=rows, notes=notes)


def parse_findings(text: str) -> list[list[str]]:
    """The categories of each finding, as labels; a finding without one is an empty list.

    >>> parse_findings('''["['Mass', 'Skin Thickening']", "['No Finding']"]''')
    [['Mass', 'Skin_Thickening'], []]
    """
    problem = "is not a JSON list of texts such as \"['Mass']\""
    try:
        outer = json.loads(text)
        findings = [ast.literal_eval(item) for item in outer] if isinstance(outer, list) else None
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(problem) from error
    if not findings or not all(isinstance(finding, list) for finding in findings):
        raise ValueError(problem)
    for name in (name for finding in findings for name in finding):
        if name not in CATEGORIES and name != NO_FINDING:
            raise ValueError(f"names {name!r}, which is none of the categories {', '.join(CATEGORIES)}")
    return [[name.replace(" ", "_") for name in finding if name != NO_FINDING] for finding in findings]


def parse_numbers(text: str) -> list[float]:
    """The numbers of a text such as "[1.5, 20.0]"; NaN is allowed here, where there is no finding."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("is not a list of numbers such as [12.5, 40.0]")
    try:
        return [float(part) for part in text[1:-1].split(",")]
    except ValueError as error:
        raise ValueError("is not a list of numbers such as [12.5, 40.0]") from error


def _labels(table: Table, findings: list[list[list[str]]]) -> list[dict[str, int]]:
    """All categories from the findings; the two that have a column of their own must agree with it."""
    present = [{name for finding in row for name in finding} for row in findings]
    for label in _OWN_COLUMN:
        for row, value in enumerate(table.parsed(label, parse_label)):
            expected = int(label in present[row])
            if value != expected:
                what = f"disagrees with finding_categories {sorted(present[row])}, which say {expected}"
                raise table.error(row, label, what, fix="correct one of the two columns")
    return [{label: int(label in names) for label in LABELS} for names in present]


def _boxes(table: Table, findings: list[list[list[str]]], notes: Counter[str]) -> list[tuple[Box, ...]]:
    """One box per finding and category."""
    columns = {name: table.parsed(name, parse_numbers) for name in _BOX_COLUMNS}
    boxes = []
    for row, finding_list in enumerate(findings):
        of_row: list[Box] = []
        if any(finding_list):
            corners = [_corner(table, row, name, values[row], len(finding_list)) for name, values in columns.items()]
            for names, (x0, y0, x1, y1) in zip(finding_list, zip(*corners, strict=True), strict=True):
                of_row += [Box(label=name, x0=x0, y0=y0, x1=x1, y1=y1) for name in names]
        boxes.append(upright(of_row, notes))
    return boxes


def _corner(table: Table, row: int, column: str, values: list[float], count: int) -> list[float]:
    if len(values) != count:
        raise table.error(row, column, f"has {len(values)} numbers for {count} findings")
    try:
        return [parse_coordinate(str(value)) for value in values]
    except ValueError as error:
        raise table.error(row, column, "holds something that is no number of pixels") from error
