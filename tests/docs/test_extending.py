"""The page "How to add": its files, changes and commands, applied to a copy of the sources as they stand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from msmil.engine.checkpoint_state import newest
from shards.manifest import read_manifest
from tests.archives import make_grouped_archive, write_csv
from tests.docs.pages import ROOT, blocks, commands
from tests.worlds import run

pytestmark = pytest.mark.slow

PAGE = "docs/extending.md"
DEADLINE_S = 150.0


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with all that the page adds, after its commands."""
    copy = tmp_path_factory.mktemp("house")
    for part in ("shards", "msmil", "launch", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(PAGE):
        if block.title is not None:
            (add if block.language == "python" else change)(copy / block.title, block.text)
    write_hospital(copy)
    program = "import sys; from tests.docs.alone import main; sys.exit(main())"
    arguments = [sys.executable, "-c", program, json.dumps(commands(PAGE))]
    done = run(arguments, deadline_s=DEADLINE_S, cwd=copy, PYTHONPATH=f"{copy}:{ROOT}")
    assert done.returncode == 0, done.stderr
    return copy


def add(file: Path, text: str) -> None:
    assert not file.exists(), f"{file.name} is there already"
    file.write_text(text, encoding="utf-8")


def change(file: Path, diff: str) -> None:
    """Replace the lines with a minus, which are there exactly once, by those with a plus."""
    marks = [(line[0], line[1:]) for line in diff.splitlines(keepends=True)]
    assert {mark for mark, _ in marks} == {"-", "+"}, diff
    before, after = ("".join(line for mark, line in marks if mark == sign) for sign in "-+")
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file}: these lines stand there {text.count(before)} times:\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


def write_hospital(folder: Path) -> None:
    """The hospital's archive: exams.csv and images/."""
    archive = make_grouped_archive(folder / "archive", exams=12)
    rows = []
    for cells in archive.rows:
        file = f"{cells['patient_id']}/{cells['image_id']}.png"
        row = {"file": file, "patient": cells["patient_id"], "side": cells["laterality"], "projection": cells["view"]}
        rows.append(row | {"cancer": cells["Mass"], "use": cells["split"]})
    write_csv(folder / "exams.csv", rows)
    archive.images.rename(folder / "images")


def metrics(house: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((house / "runs" / name / "metrics" / "test.json").read_text())
    return found


def test_the_archive_is_packed(house: Path) -> None:
    manifest = read_manifest(house / "data" / "hospital")
    assert (manifest.header.name, manifest.labels, len(manifest)) == ("hospital", ("Cancer",), 48)
    assert manifest.header.counts["images"]["test"] == 12


def test_the_backbone_trains(house: Path) -> None:
    checkpoint = newest(house / "runs" / "own_backbone" / "checkpoints")
    assert checkpoint is not None
    weights = load_file(checkpoint / "model.safetensors")
    assert weights["backbone.net.stage0.0.weight"].shape == (4, 1, 3, 3)


def test_the_pooling_trains_and_has_maps(house: Path) -> None:
    config = yaml.safe_load((house / "runs" / "own_pooling" / "config.yaml").read_text())
    assert config["model"]["pooling"] == "norm"
    assert "attention_8" in metrics(house, "own_pooling")["localisation"]["Cancer"]


def test_the_metric_is_in_the_results_with_its_interval(house: Path) -> None:
    cancer = metrics(house, "own_pooling")["labels"]["Cancer"]
    assert cancer["geometric_mean"] == pytest.approx(math.sqrt(cancer["sensitivity"] * cancer["specificity"]))
    low, high = cancer["geometric_mean_ci"]
    assert low <= cancer["geometric_mean"] <= high
    assert "geometric_mean" in cancer["scales"]["8"]
