"""report.html: whole, nameless, offline and small, from run folders of every state."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from msmil.reporting import html, report
from msmil.reporting.report import build_report
from msmil.reporting.run_files import read_run, run_names
from tests.run_folders import LABELS, SECRET, Page, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of the time; the browser's tests look at drawn ones."""
    data = io.BytesIO()
    Image.new("P", (705, 825)).save(data, format="png")
    monkeypatch.setattr(html, "png", lambda figure: data.getvalue() + bytes(10_000))


def read(*folders: Path, split: str = "test"):
    return [read_run(folder, name=name, split=split) for folder, name in zip(folders, run_names(folders), strict=True)]


def build(*folders: Path, show_ids: bool = False, split: str = "test") -> Page:
    """The report as a page; what must hold of every page is seen to here."""
    text = build_report(read(*folders, split=split), show_ids=show_ids)
    assert len(text.encode()) < 15_000_000
    page = Page(text)
    ids, targets = page.of("*", "id"), [href[1:] for href in page.of("a", "href") if href.startswith("#")]
    assert len(set(ids)) == len(ids)
    assert set(targets) <= set(ids)
    assert targets, "a table of contents"
    assert not re.search(r"</?(h\d|p|code|span|td|li|b)\b", page.text), "HTML where a reader sees it"
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert all((a["alt"] or "").strip() and str(a["src"]).startswith("data:image/") for a in images)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(|@import", text), "something outside of the file"
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; for reading only."""
    return make_run(tmp_path_factory.mktemp("runs") / "one")


def edit(file: Path, change) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_a_complete_run_is_told_completely(run: Path) -> None:
    page = build(run)
    results = json.loads((run / "metrics" / "test.json").read_text())
    for label in LABELS:
        found = results["labels"][label]
        for metric in ("auroc", "average_precision", "f1", "sensitivity"):
            low, high = found[f"{metric}_ci"]
            assert f"{found[metric]:.3f} [{low:.3f}, {high:.3f}]" in page.text
        assert f"{found['threshold']:.3f}" in page.text
        assert f"{found['scales']['8']['auroc']:.3f}" in page.text
        assert f"{found['calibration']['brier']:.3f}" in page.text
    assert "90% interval from 20 resamples of the patients" in page.text
    assert "40 images of 20 patients" in page.text
    assert "3 of 30 epochs" in page.text
    assert "loss.pos_weight" in page.text
    alternatives = "\n".join(page.of("img", "alt"))
    for what in (
        "ROC curve",
        "precision-recall",
        "reliability",
        "confusion",
        "weights of the scales",
        "loss",
        "Throughput",
    ):
        assert what in alternatives
    for what in (
        "hit 1: image with true boxes",
        "miss 1: merged map",
        "false alarm 2: attention, scale 8",
        "instance, scale 16",
    ):
        assert f"Mass, {what}" in alternatives or what in alternatives
    assert "missing" not in page.of("p", "class")


@pytest.mark.parametrize("show_ids", [False, True])
def test_ids_are_shown_only_when_asked_for(run: Path, show_ids: bool) -> None:
    text = build_report(read(run), show_ids=show_ids)
    assert (SECRET in text) is show_ids
    assert "Image " in Page(text).text


def test_the_numbers_of_images_are_lines_of_the_predictions(run: Path) -> None:
    text = build(run, show_ids=True).text
    rows = (run / "predictions" / "test.csv").read_text().splitlines()[1:]
    shown = re.findall(rf"Image (\d+) .*?image ({SECRET}_i_test_\d+),", text)
    assert len(shown) > 4
    assert all(rows[int(number) - 1].startswith(f"{name},") for number, name in shown)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"evaluated": False}, "msmil evaluate"),
        ({"evaluated": False, "validated": False}, "There is no validation metric yet"),
        ({"evaluated": False, "trained": False}, "no checkpoint in this folder"),
        ({"trained": False}, "no TensorBoard events"),
        ({"gallery": False}, "no gallery"),
        ({"prevalence": 0.0}, "no positive image"),
        ({"prevalence": 1.0}, "no negative image"),
        ({"labels": ('Mass <&> "x"',), "shape": (8, 200)}, 'Mass <&> "x"'),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, state: dict[str, object], told: str) -> None:
    assert told in build(make_run(tmp_path / "run", **state)).text  # type: ignore[arg-type]


def test_a_folder_with_a_configuration_alone_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert "has not been evaluated" in build(tmp_path).text


def test_another_split_is_pointed_to(run: Path) -> None:
    assert "msmil report" in build(run, split="val").text
    assert "--split test" in build(run, split="val").text


def test_an_older_version_is_reported_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    old = make_run(tmp_path / "old")
    (old / "data.json").unlink()
    (old / "config.yaml").write_text(
        yaml.safe_dump({"name": "old", "seed": 3, "model": {"backbone": "vgg", "gone": 1}})
    )

    def forget(tree) -> None:
        for key in ("intervals", "thresholds_from", "checkpoint", "patients", "mean_auroc", "localisation"):
            tree.pop(key)
        for found in tree["labels"].values():
            for key in ("calibration", "scales", "undefined", "auroc_ci", "f1", "threshold", "positives"):
                found.pop(key)

    edit(old / "metrics" / "test.json", forget)
    page = build(old)
    assert "vgg" in page.text
    assert any("ROC curve" in alternative for alternative in page.of("img", "alt"))
    assert "before msmil wrote down the counts" in page.text


@pytest.mark.parametrize("value", [math.nan, "x", {"a": 1}])
def test_numbers_that_are_none_are_dashes(tmp_path: Path, value: object) -> None:
    folder = make_run(tmp_path / "run", labels=("Mass",), gallery=False)

    def spoil(tree) -> None:
        tree["mean_auroc"] = tree["images"] = value
        tree["labels"]["Mass"] = dict.fromkeys(tree["labels"]["Mass"], value) | {
            "auroc": tree["labels"]["Mass"]["auroc"]
        }

    edit(folder / "metrics" / "test.json", spoil)
    build(folder)
    edit(folder / "metrics" / "test.json", lambda tree: tree.update(labels={"Mass": value}))
    build(folder)


@pytest.mark.parametrize("file", ["metrics/test.json", "predictions/test.csv", "config.yaml", "data.json"])
def test_files_cut_off_in_the_middle_are_said(tmp_path: Path, file: str) -> None:
    folder = make_run(tmp_path / "run", labels=("Mass",))
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2].rstrip(b"0123456789") + b"{")
    text = build(folder).text
    assert file.split("/")[-1] in text
    assert "cannot be read" in text or "damaged" in text
    assert SECRET not in text


def test_events_cut_off_in_the_middle_are_read_up_to_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", evaluated=False)
    (events,) = (folder / "tensorboard").glob("*tfevents*")
    events.write_bytes(events.read_bytes()[: events.stat().st_size // 2])
    steps, _ = read(folder)[0].curves.scalars["train/loss/total"]
    assert 5 < len(steps) < 20
    assert any("Training loss" in alternative for alternative in build(folder).of("img", "alt"))


def test_predictions_of_another_evaluation_draw_nothing(tmp_path: Path) -> None:
    folder, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1)
    (folder / "predictions" / "test.csv").write_bytes((other / "predictions" / "test.csv").read_bytes())
    page = build(folder)
    assert "of different evaluations" in page.text
    assert not any("ROC curve" in alternative for alternative in page.of("img", "alt"))


def test_a_gallery_of_another_evaluation_is_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    edit(folder / "gallery" / "test" / "index.json", lambda index: index.update(checkpoint="step_00000010"))
    page = build(folder)
    assert "of another evaluation" in page.text
    assert not any("hit 1" in alternative for alternative in page.of("img", "alt"))


def test_lost_and_strange_pictures_are_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    gallery = folder / "gallery" / "test"
    (gallery / "0001_merged.jpg").unlink()
    (gallery / "0002_image.jpg").write_bytes(b"no picture")
    (tmp_path / "outside.jpg").write_bytes((gallery / "0003_image.jpg").read_bytes())
    edit(gallery / "index.json", lambda i: i["cases"][2]["pictures"][0].update(file="../../../outside.jpg"))
    assert "Pictures of 3 images are gone" in build(folder).text


def test_what_does_not_fit_is_left_out_evenly_and_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(run)
    figures = sum(len(src) for src in whole.of("img", "src") if src.startswith("data:image/png"))
    pictures = sum(len(src) for src in whole.of("img", "src") if src.startswith("data:image/jpeg"))
    text_bytes = report._TEXT_BYTES + report._RUN_BYTES
    monkeypatch.setattr(report, "LIMIT_BYTES", text_bytes + figures + pictures * 3 // 4)
    page = build(run)
    assert "images are left out for the size of this file" in page.text
    alternatives = " ".join(page.of("img", "alt"))
    for label in LABELS:
        assert f"{label.replace('_', ' ')}, hit 1" in alternatives
    assert sum(map(len, page.of("img", "src"))) < figures + pictures * 3 // 4
    monkeypatch.setattr(report, "LIMIT_BYTES", text_bytes + 10_000)
    assert "A figure is left out for the size of this file" in build(run).text


def test_several_runs_are_set_side_by_side(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DETAILED", 2)
    one, two, three = (make_run(tmp_path / name, labels=("Mass",), seed=s) for s, name in enumerate(("a", "b", "c")))
    waiting = make_run(tmp_path / "waiting", labels=("Mass",), evaluated=False, seed=7)
    page = build(one, two, three, waiting)
    for folder in (one, two, three):
        results = json.loads((folder / "metrics" / "test.json").read_text())
        assert f"{results['mean_auroc']:.3f} [{results['mean_auroc_ci'][0]:.3f}" in page.text
    values = [json.loads((f / "metrics" / "test.json").read_text())["mean_auroc"] for f in (one, two, three)]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in page.text, "they differ in their seed alone"
    assert "Not evaluated on the test split: waiting" in page.text
    assert "left out: c, waiting" in page.text
    assert "Mass: ROC curves of a, b" in page.of("img", "alt")
    assert {"run-1-results", "run-2-gallery"} <= set(page.of("*", "id"))
    edit(three / "metrics" / "test.json", lambda tree: tree.update(data_fingerprint="other"))
    assert "the data they were judged on differ" in build(one, three).text
    for fold, folder in enumerate((one, three)):
        data = {"packed_fingerprint": "same", "fingerprint": f"{fold}"}
        edit(folder / "metrics" / "test.json", lambda tree, data=data: tree.update(data=data))
    assert "they were judged on differ" not in build(one, three).text, "folds have the same test images"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "fold_0", tmp_path / "b" / "fold_0", tmp_path / "b" / "fold_1"]
    assert run_names(folders) == ["a/fold_0", "b/fold_0", "b/fold_1"]
    assert run_names(folders[:1]) == ["fold_0"]


def test_a_report_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    output = tmp_path / "page.html"
    command = [sys.executable, "-c", code, "report", str(run), "--output", str(output)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    assert output.stat().st_size > 10_000
