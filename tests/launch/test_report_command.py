"""`msmil report`: where it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from msmil.reporting import html
from tests.run_folders import make_run


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "figures", lambda items, budget: html.Markup(""))


def test_a_single_run_has_its_report_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", evaluated=False, trained=False)
    assert main(["report", str(run)]) == 0
    assert f"report: {run / 'report.html'} (" in capsys.readouterr().out
    assert "<h1>msmil report: run</h1>" in (run / "report.html").read_text()
    assert main(["report", str(run), str(run)]) == 0, "the same run twice is one run"


def test_several_runs_need_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name, evaluated=False, trained=False)) for name in "ab"]
    assert main(["report", *runs]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["report", *runs, "--output", str(tmp_path / "new" / "both.html")]) == 0
    assert "<h1>msmil report: 2 runs</h1>" in (tmp_path / "new" / "both.html").read_text()


@pytest.mark.parametrize(
    ("made", "asked", "named"),
    [
        ([], "nowhere", "is no run folder"),
        (["repeated/run_0"], "repeated", "name the runs in it, such as"),
        (["data"], "data/config.yaml", "is no run folder"),
    ],
)
def test_what_is_no_run_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: list[str], asked: str, named: str
) -> None:
    for name in made:
        make_run(tmp_path / name, evaluated=False, trained=False)
    assert main(["report", str(tmp_path / asked)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msmil: error:")
    assert named in line
    assert not list(tmp_path.rglob("report.html"))
