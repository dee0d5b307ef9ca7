"""`msmil demo` runs the whole main job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import demo
from tests.worlds import ROOT, msmil

pytestmark = pytest.mark.slow


def test_phantoms_to_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINING_EXAMS", 8)
    monkeypatch.setattr(demo, "TEST_EXAMS", 6)
    overrides = ["train.epochs=1", f"output_dir={tmp_path}", "evaluate.bootstrap_replicates=20"]
    command = ["demo", "--data", str(tmp_path / "data"), "--ranks", "2", *overrides]
    done = msmil(*command)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert f"msmil watch {tmp_path}" in printed
    assert f"Report: {tmp_path / 'demo' / 'report.html'}" in printed
    assert "<h1>msmil report: demo</h1>" in (tmp_path / "demo" / "report.html").read_text()
    assert "Mean AUROC over labels" in printed
    results = json.loads((tmp_path / "demo" / "metrics" / "test.json").read_text())
    assert set(results["labels"]) == {"Mass", "Suspicious_Calcification"}
    assert results["images"] == 24
    assert set(results["localisation"]["Mass"]) >= {"merged", "attention_8", "instance_32"}


@pytest.mark.parametrize(
    ("ranks", "override"), [(1, []), (2, []), (3, ["train.batch_size=9"]), (16, ["train.batch_size=16"])]
)
def test_the_batch_fits_any_number_of_gpus(ranks: int, override: list[str]) -> None:
    assert demo._batch_for(demo.load_config(ROOT / demo.CONFIG), ranks) == override
