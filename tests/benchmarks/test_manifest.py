"""A manifest of a million images opens in no time, and costs a decoding process next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.manifest import in_a_fresh_process, write_rows

pytestmark = pytest.mark.slow


def test_a_million_images_open_in_less_than_a_second_and_cost_a_worker_less_than_50_mb(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, 1_000_000)
    opened = in_a_fresh_process("open", folder)
    assert opened["processor_seconds"] < 1, "of processors, all threads together: a busy machine adds nothing to it"
    cost = in_a_fresh_process("worker", folder)
    assert cost["own_mb"] + cost["shared_mb"] < 50


def test_the_baseline_costs_more(tmp_path: Path) -> None:
    """The measure can fail: an object for each image takes what it takes."""
    folder = write_rows(tmp_path, 50_000)
    in_a_fresh_process("open", folder)
    assert in_a_fresh_process("objects", folder)["own_mb"] > 2 * in_a_fresh_process("worker", folder)["own_mb"]
