"""The columns of samples.arrow: one row per sample, no Python object per row.

N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.checksums import SHA256_BYTES, XXH3_BYTES
from shards.types import Box, Geometry, SampleRecord

LABEL_PREFIX: Final = "label_"
GEOMETRY_PREFIX: Final = "geometry_"

_TEXT: Final = ("key", "image_id", "exam_id", "patient_id")
_CATEGORY: Final = ("laterality", "view", "split", "manufacturer", "density", "birads")
TEXT_COLUMNS: Final = ("image_id", "exam_id", "patient_id", *_CATEGORY)

_BOX: Final = pa.struct([("label", pa.string()), *((name, pa.float64()) for name in ("x0", "y0", "x1", "y1"))])
_GEOMETRY_TYPES: Final = {"int": pa.int32(), "float": pa.float64(), "bool": pa.bool_()}
_GEOMETRY: Final = {field.name: _GEOMETRY_TYPES[str(field.type)] for field in fields(Geometry)}


def schema(labels: Sequence[str], *, encoded: bool) -> pa.Schema:
    """The columns of a samples table.

    Args:
        labels: names of the labels, one int8 column each.
        encoded: low-cardinality texts are dictionary-encoded (in samples.arrow) or plain (while packing).
    """
    category = pa.dictionary(pa.int32(), pa.string()) if encoded else pa.string()
    columns = [(name, pa.string()) for name in _TEXT]
    columns += [("shard", pa.int32()), ("offset_bytes", pa.int64()), ("num_bytes", pa.int64())]
    columns += [("sha256", pa.binary(SHA256_BYTES)), ("xxh3", pa.binary(XXH3_BYTES)), ("fold", pa.int16())]
    columns += [(name, category) for name in _CATEGORY]
    columns += [(LABEL_PREFIX + name, pa.int8()) for name in labels]
    columns += [("boxes", pa.list_(_BOX))]
    columns += [(GEOMETRY_PREFIX + name, kind) for name, kind in _GEOMETRY.items()]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def to_table(records: Sequence[SampleRecord], labels: Sequence[str]) -> pa.Table:
    """Records as a table with plain texts, in order; `row` is not stored, it is the position."""
    columns: dict[str, list[Any]] = {name: [getattr(record, name) for record in records] for name in _PLAIN}
    for label in labels:
        columns[LABEL_PREFIX + label] = [record.labels[label] for record in records]
    columns["boxes"] = [
        [{"label": b.label, "x0": b.x0, "y0": b.y0, "x1": b.x1, "y1": b.y1} for b in record.boxes] for record in records
    ]
    for name in _GEOMETRY:
        columns[GEOMETRY_PREFIX + name] = [getattr(record.geometry, name) for record in records]
    plain = schema(labels, encoded=False)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in plain}, schema=plain)


_PLAIN: Final = (*_TEXT, "shard", "offset_bytes", "num_bytes", "sha256", "xxh3", "fold", *_CATEGORY)


def encode(table: pa.Table, labels: Sequence[str]) -> pa.Table:
    """A table with plain texts as one chunk of the schema of samples.arrow."""
    table = table.combine_chunks()
    for name in _CATEGORY:
        index = table.schema.get_field_index(name)
        encoded = table.column(index).dictionary_encode()
        table = table.set_column(index, name, encoded)
    return pa.table(table.columns, schema=schema(labels, encoded=True)).combine_chunks()


def to_record(table: pa.Table, row: int, labels: Sequence[str]) -> SampleRecord:
    """The record of one row of an encoded table."""
    values: dict[str, Any] = {name: table.column(name)[row].as_py() for name in table.schema.names}
    return SampleRecord(
        row=row,
        labels={name: values[LABEL_PREFIX + name] for name in labels},
        boxes=tuple(Box(**box) for box in values["boxes"]),
        geometry=Geometry(**{name: values[GEOMETRY_PREFIX + name] for name in _GEOMETRY}),
        **{name: values[name] for name in _PLAIN},
    )


def fixed(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """A column of whole numbers as a read-only array [N] that shares the table's memory."""
    return to_numbers(_chunk(table, name))


def codes(table: pa.Table, name: str) -> tuple[np.ndarray[Any, Any], list[str]]:
    """A dictionary-encoded column as codes [N] and the texts they stand for."""
    chunk = _chunk(table, name)
    return to_numbers(chunk.indices), chunk.dictionary.to_pylist()


def to_numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    """Whole numbers without nulls as a read-only array that shares their memory.

    pyarrow's own conversions, this one and `from_numbers`, import pandas first: 0.2 s and 36 MB in every rank.
    """
    assert pa.types.is_integer(array.type), array.type
    assert array.null_count == 0
    numbers = np.frombuffer(array.buffers()[1], str(array.type))[array.offset : array.offset + len(array)]
    numbers.flags.writeable = False
    return numbers


def from_numbers(values: np.ndarray[Any, Any]) -> pa.Array:
    """Whole numbers for pyarrow, sharing their memory."""
    assert values.ndim == 1, values.shape
    assert np.issubdtype(values.dtype, np.integer), values.dtype
    assert values.dtype.isnative
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def coded(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """A column of texts as int32 numbers [N], equal for equal texts, in the order of the texts.

    Equal neighbours are put together first, since rows of an exam lie side by side; then texts are sorted, which takes
    less memory than a dictionary of them.
    """
    column = _chunk(table, name)
    start = _starts(column)
    texts = column.take(from_numbers(start))
    order = pc.array_sort_indices(texts)
    sorted_starts = _starts(texts.take(order))
    del texts
    number = np.empty(len(start), np.int32)
    number[to_numbers(order)] = np.repeat(
        np.arange(len(sorted_starts), dtype=np.int32), np.diff(sorted_starts, append=len(start))
    )
    number_N: np.ndarray[Any, Any] = np.repeat(number, np.diff(start, append=len(column)))
    pa.default_memory_pool().release_unused()
    return number_N


def _starts(column: Any) -> np.ndarray[Any, Any]:
    """Where runs of equal values start, int32."""
    changes = to_numbers(pc.not_equal(column[1:], column[:-1]).cast(pa.int8()))
    return np.flatnonzero(np.concatenate([[True], changes.view(np.bool_)])).astype(np.int32)


def digests(table: pa.Table, name: str = "sha256") -> np.ndarray[Any, Any]:
    """A column of digests as uint8 [N, bytes of each] that shares the table's memory."""
    chunk = _chunk(table, name)
    data = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, chunk.type.byte_width)
    return data[chunk.offset : chunk.offset + len(chunk)]


def _chunk(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    assert column.num_chunks == 1, f"{name} has {column.num_chunks} chunks"
    return column.chunk(0)
