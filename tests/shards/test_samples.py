"""Columns as arrays, without what pyarrow's own conversions import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import samples

INTEGERS = ("int8", "uint8", "int32", "int64")


@given(
    dtype=st.sampled_from(INTEGERS),
    values=st.lists(st.integers(0, 127), max_size=9),
    start=st.integers(0, 9),
    step=st.sampled_from([1, 2, -1]),
)
def test_numbers_come_back_from_any_part_of_an_array(dtype: str, values: list[int], start: int, step: int) -> None:
    array = np.array(values, dtype)[::step]
    arrow = samples.from_numbers(array)
    assert arrow.equals(pa.array(array)), "what pyarrow makes of it"
    part = samples.to_numbers(arrow[start:])
    np.testing.assert_array_equal(part, array[start:])
    assert part.dtype == dtype
    assert not part.flags.writeable


def test_what_is_no_whole_number_is_refused() -> None:
    for array in (pa.array([0.5]), pa.array(["a"]), pa.array([True])):
        with pytest.raises(AssertionError):
            samples.to_numbers(array)
    with pytest.raises(AssertionError):
        samples.to_numbers(pa.array([1, None]))
    with pytest.raises(AssertionError):
        samples.from_numbers(np.array([0.5]))


@given(texts=st.lists(st.sampled_from(["b", "a", "ab", ""]), min_size=1, max_size=9))
def test_equal_texts_have_equal_numbers_in_the_order_of_the_texts(texts: list[str]) -> None:
    number_N = samples.coded(pa.table({"patient_id": texts}), "patient_id")
    assert number_N.tolist() == [sorted(set(texts)).index(text) for text in texts]


def test_a_rank_opens_and_counts_its_data_without_pandas(packed: Path) -> None:
    code = (
        "import sys; from msmil.engine.data_summary import describe_data; from shards.manifest import read_manifest; "
        "manifest = read_manifest(sys.argv[1]); described = describe_data(manifest, manifest.labels); "
        "print(described['counts']['images'], manifest.text('image_id', [0]), 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], check=True, capture_output=True, text=True)
    assert done.stdout.endswith(" False\n"), done.stdout
