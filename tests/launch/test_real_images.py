"""The published configurations train on real mammograms, resized by the published recipe, in both instance modes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from tests.worlds import msmil

pytestmark = pytest.mark.slow

VIEWS = ("L-CC", "L-MLO", "R-CC", "R-MLO")
LABELS = (
    "Mass", "Suspicious_Calcification", "Focal_Asymmetry", "Architectural_Distortion", "Asymmetry",
    "Suspicious_Lymph_Node", "Skin_Thickening", "Nipple_Retraction", "Global_Asymmetry", "Skin_Retraction",
)  # fmt: skip
# The same four pictures stand for three patients; nobody's findings are known, so the labels are made up.
SPLITS = {"p0": "training", "p1": "validation", "p2": "test"}
DRAWN = ("vindr_calcification_fpn_settrans", "image")  # drawing maps takes longer than a step: once is enough here


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    """The real exam, packed by the published recipe to 912 x 1520."""
    folder = tmp_path_factory.mktemp("real")
    rows = []
    for p, (patient, split) in enumerate(SPLITS.items()):
        # two training images and one to validate are enough here: a forward pass takes seconds
        for v, view in enumerate(VIEWS[:2] if split == "training" else VIEWS[2:3]):
            (folder / "images" / patient).mkdir(parents=True, exist_ok=True)
            shutil.copy(real_data / "real_exam_8bit" / f"{view}.png", folder / "images" / patient)
            cells = {
                "image": f"{patient}/{view}.png",
                "image_id": f"{patient}{view}",
                "patient_id": patient,
                "split": split,
            }
            cells |= {"laterality": view[0], "view": view[2:]}
            rows.append(cells | {label: (v + p + k) % 2 for k, label in enumerate(LABELS)})
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    source = ["--table", str(table), "--images", str(folder / "images"), "--source", "folder"]
    done = msmil("pack", str(folder / "shards"), *source, "--recipe", "mammoclip")
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("instances", ["image", "tiles"])
@pytest.mark.parametrize("name", ["vindr_mass_fpn_abmil", "vindr_calcification_fpn_settrans", "vindr_multilabel"])
def test_a_published_configuration_trains_a_few_steps(
    tmp_path: Path, real_shards: Path, name: str, instances: str
) -> None:
    changes = ["train.epochs=1", "train.batch_size=1", "train.head_warmup_epochs=0", "train.precision=fp32"]
    changes += [f"data.shards={real_shards}", f"output_dir={tmp_path}", "data.workers=0", "model.pretrained=false"]
    if (name, instances) != DRAWN:
        changes.append("tracking.images=0")
    config = f"configs/experiment/{name}.yaml"
    done = msmil("train", config, *changes, f"bags.instances={instances}", "--ranks", "1")
    assert done.returncode == 0, done.stderr
    checkpoint = newest(tmp_path / name / "checkpoints")
    assert checkpoint is not None
    state = load_checkpoint(checkpoint).state
    assert (state.step, state.samples_seen) == (2, 2)
