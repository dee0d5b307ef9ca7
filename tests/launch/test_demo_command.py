"""`msmil demo` runs the whole main job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import cli, demo
from tests.worlds import ROOT

pytestmark = pytest.mark.slow


def test_phantoms_to_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "TRAINING_EXAMS", 12)
    monkeypatch.setattr(demo, "TEST_EXAMS", 11)
    overrides = ["train.epochs=1", f"output_dir={tmp_path}", "evaluate.bootstrap_replicates=20"]
    command = ["demo", "--data", str(tmp_path / "data"), "--ranks", "2", *overrides]
    assert cli.main(command) == 0
    printed = capfd.readouterr().out
    assert f"msmil watch {tmp_path}" in printed
    assert f"Report: {tmp_path / 'demo' / 'report.html'}" in printed
    assert "<h1>msmil report: demo</h1>" in (tmp_path / "demo" / "report.html").read_text()
    assert "Mean AUROC over labels" in printed
    results = json.loads((tmp_path / "demo" / "metrics" / "test.json").read_text())
    assert set(results["labels"]) == {"Mass", "Suspicious_Calcification"}
    assert results["images"] == 44
    assert set(results["localisation"]["Mass"]) >= {"merged", "attention_8", "instance_32"}


@pytest.mark.parametrize(
    ("ranks", "override"), [(1, []), (2, []), (3, ["train.batch_size=9"]), (16, ["train.batch_size=16"])]
)
def test_the_batch_fits_any_number_of_gpus(ranks: int, override: list[str]) -> None:
    assert demo._batch_for(demo.load_config(ROOT / demo.CONFIG), ranks) == override
