"""A CSV file as texts, with errors that name the file, the row, the column and the value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import pandas as pd

from shards.errors import UserError
from shards.types import UNKNOWN, Split

Value = TypeVar("Value")

_MISSING_TEXTS: Final = frozenset({"", "nan", "na", "n/a", "none", "null", "<na>"})
_SPLIT_WORDS: Final[dict[str, Split]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SIDE_WORDS: Final = {"l": "L", "left": "L", "r": "R", "right": "R"}
_VIEW_WORDS: Final = {"cc": "CC", "mlo": "MLO"}


class Table:
    """The texts of a CSV file, stripped; rows are counted from 1 in messages, the header not counted.

    Args:
        file: where it was read from.
        frame: its cells as texts.
        id_column: the column whose value names a row in messages.
    """

    def __init__(self, file: Path, frame: pd.DataFrame, id_column: str) -> None:
        self.file, self._frame, self._id_column = file, frame, id_column

    def __len__(self) -> int:
        return len(self._frame)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return [str(name) for name in self._frame.columns]

    def texts(self, column: str) -> list[str]:
        """The cells of a column that exists."""
        return [str(text).strip() for text in self._frame[column].tolist()]

    def texts_or_empty(self, column: str) -> list[str]:
        """The cells of an optional column; missing values, or a missing column, are empty texts."""
        if column not in self._frame.columns:
            return [""] * len(self)
        return ["" if is_missing(text) else text for text in self.texts(column)]

    def parsed(self, column: str, parse: Callable[[str], Value]) -> list[Value]:
        """A column through `parse`, which raises ValueError("is not ..., fix") for a text that it does not know."""
        values = []
        for row, text in enumerate(self.texts(column)):
            try:
                values.append(parse(text))
            except ValueError as error:
                raise self.error(row, column, str(error)) from error
        return values

    def error(self, row: int, column: str, what: str, *, fix: str = "correct the cell") -> UserError:
        """An error about one cell; `row` counts from 0."""
        name = self._frame[self._id_column].iloc[row]
        text = self._frame[column].iloc[row]
        thing = f"row {row + 1} ({self._id_column} {name}), column {column}: {text!r} {what}"
        return UserError(thing, fix=fix, file=self.file)

    def check_unique(self, column: str, values: Sequence[str]) -> None:
        """Refuse a value that comes twice."""
        first: dict[str, int] = {}
        for row, value in enumerate(values):
            earlier = first.setdefault(value, row)
            if earlier != row:
                raise self.error(row, column, f"was in row {earlier + 1} already", fix="keep one row per image")


def read_table(file: Path, *, required: Sequence[str], id_column: str) -> Table:
    """Read a CSV file, comma-separated, UTF-8, with a header.

    Raises:
        UserError: the file is missing, unreadable, empty, no CSV, has a column twice, or lacks one of `required`.
    """
    try:
        # The header is read as a row: pandas would rename a column that comes twice, and take the first column for an
        # index where the rows are longer than the header. So rows of more cells than the header are an error.
        cells = pd.read_csv(
            file,
            header=None,
            index_col=False,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
    except FileNotFoundError as error:
        raise UserError("the table is missing", fix="check its path", file=file) from error
    except OSError as error:
        fix = "give a CSV file that you may read"
        raise UserError(f"the table cannot be read ({error.strerror or error})", fix=fix, file=file) from error
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        fix = "give a CSV file: UTF-8, separated by commas, with a header, no row of more cells than the header"
        raise UserError(f"the table cannot be read ({str(error).strip()})", fix=fix, file=file) from error
    names = [str(text).strip() or f"Unnamed: {column}" for column, text in enumerate(cells.iloc[0])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        thing = f"the table has more than one column {', '.join(map(repr, twice))} (spaces around a name do not count)"
        raise UserError(thing, fix="name every column differently", file=file)
    check_columns(file, names, required)
    frame = cells.iloc[1:].set_axis(names, axis="columns")
    if frame.empty:
        raise UserError("the table has a header and no rows", fix="give a table with a row per image", file=file)
    return Table(file, frame, id_column)


def check_columns(file: Path, present: Sequence[str], required: Sequence[str]) -> None:
    """Name the first missing column, and the columns that look like it."""
    for name in required:
        if name in present:
            continue
        lowered = {column.lower(): column for column in present}
        near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
        hint = f"near it: {', '.join(near)}" if near else f"it has {', '.join(present)}"
        missing = [column for column in required if column not in present]
        more = f" ({len(missing)} are missing in all: {', '.join(missing)})" if len(missing) > 1 else ""
        raise UserError(f"no column {name!r}{more}; {hint}", fix=f"name a column {name!r}", file=file)


def is_missing(text: str) -> bool:
    """Whether a cell is empty or one of the words for it, such as NaN."""
    return text.lower() in _MISSING_TEXTS


def parse_label(text: str) -> int:
    """1, 0, or UNKNOWN for an empty cell."""
    if is_missing(text):
        return UNKNOWN
    if text in {"0", "0.0", "1", "1.0"}:
        return int(text[0])
    raise ValueError("is not 0, 1 or empty")


def parse_split(text: str) -> Split:
    """train, val or test, by their usual words."""
    split = _SPLIT_WORDS.get(text.lower())
    if split is None:
        raise ValueError("is none of training, validation, test")
    return split


def parse_laterality(text: str) -> str:
    """L or R."""
    side = _SIDE_WORDS.get(text.lower())
    if side is None:
        raise ValueError("is neither L nor R")
    return side


def parse_view(text: str) -> str:
    """CC or MLO."""
    view = _VIEW_WORDS.get(text.lower())
    if view is None:
        raise ValueError("is neither CC nor MLO")
    return view


def parse_fold(text: str) -> int:
    """A fold from 0 on, or -1 for an empty cell."""
    if is_missing(text):
        return -1
    try:
        fold = float(text)
    except ValueError:
        fold = -1.0
    if fold < 0 or fold != int(fold) or fold > 999:
        raise ValueError("is not a fold (0, 1, 2, ... or empty)")
    return int(fold)


def parse_required(text: str) -> str:
    """A text that must not be empty."""
    if is_missing(text):
        raise ValueError("is empty")
    return text


def parse_coordinate(text: str) -> float:
    """A finite number of pixels."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ValueError("is not a number of pixels")
    return value
