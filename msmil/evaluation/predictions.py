"""Predictions of a split as a table, one row per image: `predictions/<split>.csv` of a run.

Columns: image_id, exam_id, patient_id; per label target_<label> (1, 0, -1 unknown) and probability_<label>; per label
and scale probability_<label>_scale<stride> (with deep supervision) and weight_<label>_scale<stride> (with a weighted
scale aggregator). Numbers are written so that they are read back exactly.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from msmil.types import Prediction
from shards.errors import UserError
from shards.files import atomic_file
from shards.types import UNKNOWN

_IDS: Final = ("image_id", "exam_id", "patient_id")
_TARGET: Final = "target_"
_AGAIN: Final = "write the predictions again with `msmil evaluate`"
_Column = tuple[str, int | None, str]  # what it holds, scale, label


def write_predictions(
    path: Path, predictions: Sequence[Prediction], labels: Sequence[str], scales: Sequence[int]
) -> None:
    """Write the table; it appears under its name only when whole.

    Args:
        path: of the CSV; its folder is made.
        predictions: one per image, every image once.
        labels: in the order of the columns.
        scales: strides, in the order of the columns.

    Raises UserError where `check_predictions` does, or where the table cannot be written.
    """
    check_predictions(predictions, labels, scales)
    probability_keys = [(s, name) for s in scales for name in labels if predictions[0].scale_probability]
    weight_keys = [(s, name) for s in scales for name in labels if predictions[0].scale_weight]
    columns = [*_IDS, *(f"{_TARGET}{name}" for name in labels), *(f"probability_{name}" for name in labels)]
    columns += [f"probability_{name}_scale{s}" for s, name in probability_keys]
    columns += [f"weight_{name}_scale{s}" for s, name in weight_keys]
    if len(set(columns)) != len(columns):
        twice = sorted({column for column in columns if columns.count(column) > 1})
        raise UserError(f"labels {list(labels)} give columns of one name, {twice}", fix="rename a label", file=path)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for p in predictions:
        writer.writerow(
            [p.image_id, p.exam_id, p.patient_id]
            + [p.target[name] for name in labels]
            + [repr(float(p.probability[name])) for name in labels]
            + [repr(float(p.scale_probability[key])) for key in probability_keys]
            + [repr(float(p.scale_weight[key])) for key in weight_keys]
        )
    write_atomically(path, text.getvalue().encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote; labels and scales are those of the columns.

    Raises UserError naming the file, and the line where there is one: missing file, missing or unknown column, a line
    with too few or too many fields, something that is no number, or what `check_predictions` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError("there is no such file", fix=_AGAIN, file=path) from error
    except UnicodeDecodeError as error:
        raise UserError("the file is no UTF-8 text", fix=_AGAIN, file=path) from error
    lines = csv.reader(io.StringIO(text, newline=""))
    header = next(lines, [])
    labels, scales, kind = _columns(header, path)
    predictions = [_prediction(header, kind, line, path, lines.line_num) for line in lines]
    check_predictions(predictions, labels, scales, file=path)
    return predictions


def check_predictions(
    predictions: Sequence[Prediction], labels: Sequence[str], scales: Sequence[int], *, file: Path | None = None
) -> None:
    """Refuse, with a UserError that names the image, what no metric may be computed from.

    An image that comes twice, no image at all, a target other than 1, 0, -1, a probability or weight outside 0..1 (NaN
    included), a label or scale that is missing, or scale values on some images only.
    """
    if not predictions:
        raise UserError("there are no predictions", fix="evaluate a split that has images", file=file)
    keys = {(s, name) for s in scales for name in labels}
    probability_keys = keys if predictions[0].scale_probability else set()
    weight_keys = keys if predictions[0].scale_weight else set()
    seen: set[str] = set()
    for p in predictions:
        if p.image_id in seen:
            raise UserError(f"image {p.image_id} comes twice", fix="predict every image exactly once", file=file)
        seen.add(p.image_id)
        _check_keys(p.image_id, "a target", p.target, set(labels), file)
        _check_keys(p.image_id, "a probability", p.probability, set(labels), file)
        _check_keys(p.image_id, "a scale probability", p.scale_probability, probability_keys, file)
        _check_keys(p.image_id, "a scale weight", p.scale_weight, weight_keys, file)
        _check_values(p, file)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole or not at all; a file that was there stays until then.

    Raises UserError where the system refuses (full disk, no permission).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, needed_bytes=len(data)) as file:
            file.write(data)
    except OSError as error:
        fix = "choose a folder that can be written to, and run the command again"
        raise UserError(f"the file cannot be written ({error.strerror})", fix=fix, file=path) from error


def _check_keys(
    image_id: str, what: str, given: Collection[object], wanted: Collection[object], file: Path | None
) -> None:
    if set(given) != set(wanted):
        thing = f"image {image_id} has {what} for {sorted(map(str, given))} instead of {sorted(map(str, wanted))}"
        raise UserError(thing, fix="predict the same labels and scales for every image", file=file)


def _check_values(p: Prediction, file: Path | None) -> None:
    for name, target in p.target.items():
        if target not in (0, 1, UNKNOWN):
            fix = "give 1, 0, or -1 for unknown"
            raise UserError(f"image {p.image_id} has target {target!r} for {name}", fix=fix, file=file)
    by_scale = (*p.scale_probability.items(), *p.scale_weight.items())
    named = [*p.probability.items(), *((f"{name}, scale {scale}", value) for (scale, name), value in by_scale)]
    for name, value in named:
        if not 0 <= value <= 1:
            fix = "look at this image and at the training's loss; a model that has diverged gives nan"
            raise UserError(f"image {p.image_id} has {value!r} for {name}, not in 0..1", fix=fix, file=file)


def _columns(header: Sequence[str], path: Path) -> tuple[list[str], list[int], dict[str, _Column]]:
    """Labels and scales in the order of the columns, and what each column but the ids holds."""
    labels = [column.removeprefix(_TARGET) for column in header if column.startswith(_TARGET)]
    kind: dict[str, _Column] = {f"{_TARGET}{name}": ("target", None, name) for name in labels}
    kind |= {f"probability_{name}": ("probability", None, name) for name in labels}
    for name in labels:
        for column in header:
            match = re.fullmatch(rf"(probability|weight)_{re.escape(name)}_scale(\d+)", column)
            if match and column not in kind:
                kind[column] = (match[1], int(match[2]), name)
    missing = [column for column in (*_IDS, *(f"probability_{name}" for name in labels)) if column not in header]
    strange = [column for column in header if column not in _IDS and column not in kind]
    if missing or strange or not labels or len(set(header)) != len(header):
        thing = f"its columns are no table of predictions: missing {missing}, unknown {strange}"
        thing += "" if labels else f", no column {_TARGET}<label>"
        raise UserError(thing, fix=_AGAIN, file=path)
    scales = list(dict.fromkeys(scale for _, scale, _ in kind.values() if scale is not None))
    return labels, scales, kind


def _prediction(
    header: Sequence[str], kind: dict[str, _Column], fields: list[str], path: Path, line: int
) -> Prediction:
    if len(fields) != len(header):
        thing = f"line {line} has {len(fields)} fields instead of {len(header)}"
        raise UserError(thing, fix=_AGAIN, file=path)
    row = dict(zip(header, fields, strict=True))
    prediction = Prediction(row["image_id"], row["exam_id"], row["patient_id"], {}, {}, {}, {})
    for column, (what, scale, name) in kind.items():
        try:
            if what == "target":
                prediction.target[name] = int(row[column])
            elif scale is None:
                prediction.probability[name] = float(row[column])
            else:
                by_scale = prediction.scale_probability if what == "probability" else prediction.scale_weight
                by_scale[scale, name] = float(row[column])
        except ValueError as error:
            thing = f"line {line} has {row[column]!r} in column {column}, which is no number"
            raise UserError(thing, fix=_AGAIN, file=path) from error
    return prediction
