"""The benchmark of saving runs, and says both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.saving import main


def test_it_prints_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--megabytes", "0.1", "--steps", "2", "--every", "1", "--step-s", "0.001", "--rounds", "1"]
    assert set(main([*sizes, "--folder", str(tmp_path)])) == {"in line", "beside"}
    assert "beside / in line:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
