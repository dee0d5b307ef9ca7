"""`msmil watch`: runs by nice names, mistakes in one line, and TensorBoard as a person sees it, in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from selenium.webdriver import Chrome

from launch import cli
from launch.watch import find_runs, link
from shards.errors import UserError
from tests.browser import browser
from tests.runs import resumed_run
from tests.worlds import ROOT, environment, wait_for

# TensorBoard's older dashboards lie in nested shadow roots
DEEP = """
const deep = (selector, root) => {
  const found = [...root.querySelectorAll(selector)];
  for (const e of root.querySelectorAll('*')) if (e.shadowRoot) found.push(...deep(selector, e.shadowRoot));
  return found;
};
"""


def make_runs(root: Path, *names: str) -> None:
    for name in names:
        (root / name / "tensorboard").mkdir(parents=True)


def test_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs", "demo", "repeated/run_0", "repeated/run_1", "sweep/a/fold_0")
    (tmp_path / "runs" / "converted" / "checkpoints").mkdir(parents=True)
    root = tmp_path / "runs"
    assert set(find_runs([root])) == {"demo", "repeated/run_0", "repeated/run_1", "sweep/a/fold_0"}
    assert find_runs([root / "demo"]) == {"demo": root / "demo"}
    assert set(find_runs([root / "demo", root / "repeated"])) == {"demo", "run_0", "run_1"}
    assert set(find_runs([root, root / "demo", root / ".." / "runs"])) == set(find_runs([root])), "each run once"


def test_names_that_are_alike_get_more_of_their_paths(tmp_path: Path) -> None:
    make_runs(tmp_path, "a/demo", "b/demo", "b/other", "c/x/run_0", "d/x")
    assert set(find_runs([tmp_path / "a", tmp_path / "b"])) == {"a/demo", "b/demo", "other"}
    names = find_runs([tmp_path / "c", tmp_path / "d"])
    assert names == {"c/x/run_0": tmp_path / "c" / "x" / "run_0", "d/x": tmp_path / "d" / "x"}, "x is no folder of x"
    inside = tmp_path / "d" / "x" / "more"
    make_runs(inside, "run_0")
    assert set(find_runs([tmp_path / "d", inside])) == {"x"}, "nothing is linked into a run's own folder"


def test_links_follow_the_runs(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    make_runs(tmp_path / "runs", *(f"run_{i}" for i in range(100)), "group/run_0")
    runs = find_runs([tmp_path / "runs"])
    link(links, runs)
    link(links, runs)
    assert len([path for path in links.rglob("*") if path.is_symlink()]) == 101
    assert (links / "group" / "run_0").resolve() == tmp_path / "runs" / "group" / "run_0" / "tensorboard"
    link(links, {"demo": tmp_path / "runs" / "run_7"})
    assert [path.name for path in links.rglob("*") if path.is_symlink()] == ["demo"]
    assert (tmp_path / "runs" / "run_0" / "tensorboard").is_dir(), "runs are not touched"


@pytest.mark.parametrize(("folder", "words"), [("empty", "no run in it"), ("missing", "no such folder")])
def test_a_folder_without_runs_is_one_line(
    tmp_path: Path, folder: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["watch", str(tmp_path / folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    with pytest.raises(UserError):
        find_runs([tmp_path / folder])


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_runs(tmp_path, "demo")
    before = signal.getsignal(signal.SIGTERM)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        try:
            assert cli.main(["watch", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
        finally:
            signal.signal(signal.SIGTERM, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"port \d+ is taken. Fix: ", line)


@contextmanager
def watching(folder: Path, *folders: Path) -> Iterator[str]:
    """The address of TensorBoard on these folders; Ctrl-C ends it quietly."""
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        command = [sys.executable, "-m", "launch.cli", "watch", *map(str, folders)]
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=stdout, stderr=stderr)
        try:
            wait_for(lambda: "http://" in out.read_text() or process.poll() is not None, deadline_s=60)
            found = re.fullmatch(r"TensorBoard shows \d+ runs? at (http://\S+) \(Ctrl-C ends it\)\n", out.read_text())
            assert found, out.read_text() + err.read_text()
            yield found[1].rstrip("/")
        finally:
            os.kill(process.pid, signal.SIGINT)
            code = process.wait(20)
    assert (code, err.read_text()) == (0, "")


def fetch(url: str) -> Any:
    with urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


def show(page: Chrome, url: str, dashboard: str, script: str, *, deadline_s: float = 90) -> None:
    """Open a dashboard and wait until the script finds what it should show."""
    page.get("about:blank")
    page.get(f"{url}/#{dashboard}")
    wait_for(lambda: bool(page.execute_script(f"{DEEP} return {script}")), deadline_s=deadline_s)


@pytest.mark.slow
def test_a_person_sees_everything_in_a_browser(tmp_path: Path, packed: Path) -> None:
    run = resumed_run(tmp_path, packed, tracking={"images": 2})
    cut = tmp_path / "runs" / "cut" / "tensorboard"
    cut.mkdir(parents=True)  # a run that was cut off in the middle of its first validation
    first = min((run / "tensorboard").iterdir())
    (cut / first.name).write_bytes(first.read_bytes()[:40_000])
    with watching(tmp_path, run.parent) as url, browser() as page:
        show(page, url, "timeseries", "deep('scalar-card line-chart', document).length > 2")
        show(page, url, "images", "deep('img', document).filter(i => i.naturalWidth > 300).length == 2")
        curves = "deep('tf-pr-curve-card', document).flatMap(card => deep('path.line', card.shadowRoot))"
        show(page, url, "pr_curves", f"{curves}.filter(path => path.getAttribute('d').length > 100).length >= 2")
        best = fetch(f"{url}/data/plugin/scalars/scalars?run=tiny&tag=best/auroc")[-1][2]
        rows = "deep('vaadin-grid-cell-content', document).map(cell => cell.textContent.trim())"
        show(page, url, "hparams", f"['tiny', 'best/auroc', '{best:.5f}'].every(text => {rows}.includes(text))")
        show(page, url, "custom_scalars", "deep('tf-custom-scalar-multi-line-chart-card', document).length > 5")
        assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []

        assert sorted(fetch(f"{url}/data/runs")) == ["cut", "tiny"]
        tags = fetch(f"{url}/data/plugin/images/tags")["tiny"]
        assert len(tags) == 2
        validated = [step for _, step, _ in fetch(f"{url}/data/plugin/scalars/scalars?run=tiny&tag=val/auroc/mean")]
        assert len(validated) == 2
        for tag in tags:
            shown = fetch(f"{url}/data/plugin/images/images?run=tiny&tag={tag.replace('+', '%2B')}&sample=0")
            assert [image["step"] for image in shown] == validated, "a resumed run shows each validation once"
