"""Mean and spread of several runs, and what becomes of a number that a run does not define."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from msmil.evaluation.classification import METRICS
from msmil.evaluation.summary import summarise, summary_table, write_summary


def results(auroc: float | None, scale_auroc: float = 0.5) -> dict[str, Any]:
    rest = dict.fromkeys(METRICS, 0.25)
    merged = rest | {"auroc": auroc, "scales": {"16": rest | {"auroc": scale_auroc}}}
    localisation = {"Mass": {"merged": {"rate": 0.125}}}
    validation = {"labels": {"Mass": merged}, "mean_auroc": 0.9}
    head = {"split": "test", "mean_auroc": auroc, "localisation": localisation, "validation": validation}
    return head | {"labels": {"Mass": merged}}


def test_mean_and_sample_standard_deviation() -> None:
    summary = summarise({"run_0": results(0.5), "run_1": results(0.7), "run_2": results(0.9)})
    column = "test/Mass/aggregated/auroc"
    assert summary.mean[column] == pytest.approx(0.7)
    assert summary.std[column] == pytest.approx(0.2)
    assert summary.std["test/Mass/scale_16/auroc"] == 0
    assert summary.mean["test/Mass/merged/peak_in_box_rate"] == 0.125
    assert {"val/Mass/scale_16/f1", "val/mean_auroc", "test/mean_auroc"} <= set(summary.mean)


def test_what_a_run_does_not_define_is_left_out_and_told(tmp_path: Path) -> None:
    summary = summarise({"run_0": results(0.5), "run_1": results(None), "run_2": results(0.7)})
    column = "test/Mass/aggregated/auroc"
    assert summary.mean[column] == pytest.approx(0.6)
    assert summary.defined[column] == 2
    assert "(of 2)" in summary_table(summary, ["Mass"])
    write_summary(tmp_path, summary)
    with (tmp_path / "summary.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert table["run_1"][column] == ""
    assert table["defined"][column] == "2"
    assert json.loads((tmp_path / "summary.json").read_text())["runs"]["run_1"][column] is None


def test_a_single_run_has_no_spread() -> None:
    summary = summarise({"run_0": results(None)})
    assert summary.mean["test/Mass/aggregated/auroc"] is None
    assert summary.mean["val/mean_auroc"] == 0.9
    assert summary.std["val/mean_auroc"] is None


def test_the_table_has_a_row_per_split_label_and_branch() -> None:
    lines = summary_table(summarise({"a": results(0.5), "b": results(0.75)}), ["Mass"]).splitlines()
    assert "2 runs (a, b)" in lines[0]
    assert [line.split()[:3] for line in lines[2:]] == [
        ["test", "Mass", "aggregated"],
        ["test", "Mass", "scale_16"],
        ["val", "Mass", "aggregated"],
        ["val", "Mass", "scale_16"],
    ]
    assert "0.625 +- 0.177" in lines[2]
