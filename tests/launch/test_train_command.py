"""`msmil train` and `msmil evaluate` as a user runs them, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest, pointed
from msmil.reporting.gallery import read_gallery
from shards.manifest import read_manifest
from tests.archives import make_grouped_archive
from tests.docs.alone import one_rank_in_this_process
from tests.experiments import TINY, write_tiny
from tests.run_folders import Page
from tests.worlds import ROOT, alive, children_running, environment, msmil, run, wait_for

pytestmark = pytest.mark.slow


def starting_from(file: object) -> dict[str, object]:
    """Pretrained weights of a file in place of the hub's, which timm loads in the same way."""
    options = TINY["model"]["backbone_options"] | {"pretrained_cfg_overlay": {"file": str(file)}}
    return {"pretrained": True, "backbone_options": options}


def scalars(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """A run of two CPU ranks."""
    folder = tmp_path_factory.mktemp("trained")
    done = msmil("train", str(write_tiny(folder, packed)), "--ranks", "2", launcher=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def test_a_run_folder_explains_itself(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "environment.txt", "log.txt", "checkpoints", "tensorboard"} <= names
    assert "epoch 2 of 2: loss" in (trained / "log.txt").read_text()
    checkpoint = newest(trained / "checkpoints")
    assert checkpoint is not None
    assert load_checkpoint(checkpoint).state.epoch == 2
    assert (checkpoint / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    assert pointed(trained / "checkpoints", "best") is not None


def test_tensorboard_has_what_a_person_watches(trained: Path) -> None:
    tags = set(scalars(trained / "tensorboard"))
    losses = {"total", "aggregated", "label/Mass", "label/Suspicious_Calcification", "scale/8", "scale/16"}
    phases = {"wait", "forward", "backward", "optimizer", "step"}
    assert {f"train/loss/{name}" for name in losses} <= tags
    assert {f"train/seconds/{name}" for name in phases} <= tags
    assert {"train/gradient_norm", "train/images_per_s", "train/memory_gb", "train/lr/backbone/decay"} <= tags
    assert {f"ranks/seconds/{name}" for name in ("rank_0", "rank_1", "min", "mean", "max")} <= tags
    assert {"val/loss/total", "val/loss/label/Mass", "best/auroc", "best/auroc/Mass"} <= tags
    assert {"val/auroc/mean", "val/auroc/Mass", "val/auroc/Mass/scale_8", "val/average_precision/Mass"} <= tags


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, evaluated by two ranks."""
    copy = tmp_path_factory.mktemp("evaluated") / "tiny"
    shutil.copytree(trained, copy)
    done = msmil("evaluate", str(copy), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    return copy


def test_evaluation_counts_every_image_once(evaluated: Path, packed: Path) -> None:
    manifest = read_manifest(packed)
    for split in ("val", "test"):
        with (evaluated / "predictions" / f"{split}.csv").open() as file:
            rows = [row["image_id"] for row in csv.DictReader(file)]
        assert sorted(rows) == sorted(manifest.text("image_id", manifest.rows(split)))
    results = json.loads((evaluated / "metrics" / "test.json").read_text())
    assert set(results["labels"]) == {"Mass", "Suspicious_Calcification"}
    assert set(results["labels"]["Mass"]["scales"]) == {"8", "16"}
    names = {"merged", "attention_8", "attention_16", "instance_8", "instance_16"}
    assert set(results["localisation"]["Mass"]) == names
    figures = {path.name for path in (evaluated / "figures").iterdir()}
    kinds = ("roc", "precision_recall", "confusion", "reliability", "maps")
    assert {f"test_Mass_{kind}.png" for kind in kinds} <= figures


def test_a_run_tells_its_data_without_the_shards(evaluated: Path, packed: Path) -> None:
    manifest = read_manifest(packed)
    data = json.loads((evaluated / "data.json").read_text())
    assert data == json.loads((evaluated / "metrics" / "test.json").read_text())["data"]
    assert data["fingerprint"] == manifest.fingerprint
    packed_counts = manifest.header.counts
    assert {key: data["counts"][key] for key in ("images", "exams", "patients")} == {
        key: packed_counts[key] for key in ("images", "exams", "patients")
    }
    assert data["counts"]["boxes"]["Mass"] == packed_counts["boxes"]["Mass"]


def test_the_gallery_shows_what_the_predictions_say(evaluated: Path, packed: Path) -> None:
    gallery = read_gallery(evaluated / "gallery" / "test")
    assert gallery is not None
    with (evaluated / "predictions" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    threshold = gallery.index["labels"]["Mass"]["threshold"]
    manifest = read_manifest(packed)
    records = {record.image_id: record for record in (manifest.record(int(r)) for r in manifest.rows("test"))}
    cases = [case for case in gallery.index["cases"] if case["label"] == "Mass"]
    assert cases
    for case in cases:
        row, record = rows[case["number"] - 1], records[case["image_id"]]
        assert row["image_id"] == case["image_id"]
        assert float(row["probability_Mass"]) == case["probability"]
        truth, called = row["target_Mass"] == "1", case["probability"] >= threshold
        assert case["kind"] == ("hit" if called else "miss") if truth else "false_alarm"
        assert case["boxes"] == sum(box.label == "Mass" for box in record.boxes)
        assert (case["peak_in_box"] is None) == (case["boxes"] == 0)
        with Image.open(io.BytesIO(gallery.picture(case["pictures"][0]["file"]) or b"")) as picture:
            assert picture.size == (48, 64)


def test_an_evaluated_run_is_reported(evaluated: Path, tmp_path: Path) -> None:
    assert main(["report", str(evaluated), "--output", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    results = json.loads((evaluated / "metrics" / "test.json").read_text())
    assert f"{results['labels']['Mass']['auroc']:.3f}" in page.text
    assert "missing" not in page.of("p", "class"), "nothing is missing"
    assert any("attention, scale 8" in alternative for alternative in page.of("img", "alt"))


def test_one_rank_and_two_evaluate_alike(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(trained, alone)
    with one_rank_in_this_process():
        assert msmil("evaluate", str(alone), "--ranks", "1").returncode == 0
    tables = []
    for folder in (alone, evaluated):
        with (folder / "predictions" / "test.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert [row["image_id"] for row in tables[0]] == [row["image_id"] for row in tables[1]]
    for a, b in zip(*tables, strict=True):
        assert float(a["probability_Mass"]) == pytest.approx(float(b["probability_Mass"]), abs=1e-6)


def test_the_same_command_again_does_nothing_more(trained: Path) -> None:
    with one_rank_in_this_process():  # on other ranks than those that trained it
        done = msmil("train", str(trained / "config.yaml"), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert "already trained" in done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_raw_launchers_start_the_same_training(tmp_path: Path, packed: Path, launcher: str) -> None:
    config = str(write_tiny(tmp_path, packed, name=launcher, train={"epochs": 1}))
    if launcher == "torchrun":
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launch.train", config]
    else:
        layout = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        command = ["accelerate.commands.launch", *layout, "-m", "launch.train", config]
    done = run([sys.executable, "-m", *command], deadline_s=120)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path / "runs" / launcher / "checkpoints") is not None


@pytest.mark.parametrize(
    ("sections", "arguments", "named"),
    [
        ({"optim": {"learning_rate": 1}}, [], ("tiny.yaml", "unknown key optim.learning_rate")),
        ({}, ["optm.lr=1"], ("optm", "optim")),
        ({"train": {"batch_size": 7}}, [], ("batch size of 7", "2 ranks")),
        ({"train": {"batch_size": 600}}, [], ("600", "samples")),
        ({"data": {"labels": ["Masss"]}}, [], ("Masss", "Mass")),
        ({"model": {"backbone": "resnet10"}}, [], ("resnet10", "resnet10t")),
        ({"model": {"scales": [2, 3]}}, [], ("model.scales",)),
        ({"bags": {"pad_multiple_px": 8}}, [], ("bags.pad_multiple_px", "16")),
        ({"train": {"precision": "fp16"}}, [], ("fp16", "GPU")),
        ({"train": {"trainable_blocks": 99}}, [], ("trainable_blocks", "99")),
        ({"model": starting_from("nowhere.pth")}, [], ("pretrained weights of 'resnet10t'", "model.pretrained")),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, packed: Path, sections: dict[str, object], arguments: list[str], named: tuple[str, ...]
) -> None:
    done = msmil("train", str(write_tiny(tmp_path, packed, **sections)), *arguments, "--ranks", "2")
    assert_refused(done, *named)
    assert not (tmp_path / "runs").exists()


def test_pretrained_weights_are_asked_for_once(tmp_path: Path, packed: Path) -> None:
    weights = tmp_path / "weights.pth"
    options = TINY["model"]["backbone_options"]
    torch.save(timm.create_model("resnet10t", **options).state_dict(), weights)
    config = write_tiny(tmp_path, packed, model=starting_from(weights), train={"epochs": 1})
    with one_rank_in_this_process():
        assert msmil("train", str(config), "--ranks", "1").returncode == 0
        weights.unlink()
        done = msmil("train", str(config), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    assert "already trained" in done.stderr


def assert_refused(done: subprocess.CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("msmil: error:")]
    assert len(lines) == 1, done.stderr
    assert "Fix:" in lines[0]
    for text in named:
        assert text in lines[0]


def test_a_folder_with_another_configuration_is_refused(trained: Path, packed: Path) -> None:
    config = write_tiny(trained.parents[1], packed, optim={"beta1": 0.5})
    assert_refused(msmil("train", str(config), "--ranks", "2"), "optim.beta1 is 0.9 there and 0.5 now")


def test_a_variable_that_says_otherwise_is_refused(tmp_path: Path, packed: Path) -> None:
    done = msmil("train", str(write_tiny(tmp_path, packed)), ACCELERATE_MIXED_PRECISION="bf16")
    assert_refused(done, "ACCELERATE_MIXED_PRECISION=bf16", "train.precision: fp32")


@pytest.mark.parametrize("command", [("train", "x.yaml"), ("evaluate", "runs/x")])
@pytest.mark.parametrize("ranks", ["0", "-1", "two"])
def test_numbers_of_ranks_are_checked(command: tuple[str, str], ranks: str) -> None:
    done = msmil(*command, "--ranks", ranks)
    assert done.returncode == 2
    assert "--ranks" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_data_are_judged_only_when_they_are_named(trained: Path, tmp_path: Path) -> None:
    archive = make_grouped_archive(tmp_path / "other", exams=12, seed=5)
    source = ["--table", str(archive.table), "--images", str(archive.images)]
    assert msmil("pack", str(tmp_path / "shards"), *source).returncode == 0
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder)
    config = run_folder / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    own = tree["data"]["shards"]
    config.write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"shards": str(tmp_path / "shards")}}))
    assert_refused(msmil("evaluate", str(run_folder), "--ranks", "1"), "fingerprint")
    config.write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"shards": own}}))
    with one_rank_in_this_process():
        done = msmil("evaluate", str(run_folder), "--shards", str(tmp_path / "shards"), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    results = json.loads((run_folder / "metrics" / "test.json").read_text())
    assert results["other_data_than_trained_on"] is True


def test_a_best_checkpoint_that_is_gone_is_not_replaced_silently(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    best = pointed(copy / "checkpoints", "best")
    assert best is not None
    shutil.rmtree(best)
    assert_refused(msmil("evaluate", str(copy), "--ranks", "1"), "no checkpoint 'best'")


def copy_shards(packed: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "shards"
    shutil.copytree(packed, copy)
    return copy


def test_a_truncated_tar_is_named_before_anything_starts(tmp_path: Path, packed: Path) -> None:
    copy = copy_shards(packed, tmp_path)
    tar = sorted(copy.glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size // 2)
    assert_refused(msmil("train", str(write_tiny(tmp_path, copy)), "--ranks", "2"), tar.name)


def test_a_changed_tar_stops_all_ranks_with_its_name(tmp_path: Path, packed: Path) -> None:
    copy = copy_shards(packed, tmp_path)
    manifest = read_manifest(copy)
    row = int(manifest.rows("train")[0])
    shard, offset, size, *_ = manifest.location(row)
    tar = copy / manifest.shards[shard].name
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 0xFF
    tar.write_bytes(data)
    done = msmil("train", str(write_tiny(tmp_path, copy)), "--ranks", "2")
    assert_refused(done, tar.name, manifest.record(row).key)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path, packed: Path) -> None:
    copy = copy_shards(packed, tmp_path)
    file = copy / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"schema_version": 99}))
    assert_refused(msmil("train", str(write_tiny(tmp_path, copy)), "--ranks", "2"), "manifest.json", "99")


def test_a_loss_that_is_not_finite_names_the_samples(tmp_path: Path, packed: Path) -> None:
    config = write_tiny(tmp_path, packed, optim={"lr": 1e30, "warmup_epochs": 0})
    done = msmil("train", str(config), "--ranks", "2")
    assert_refused(done, "not finite", "the batch held the samples")
    manifest = read_manifest(packed)
    assert sum(manifest.record(int(row)).key in done.stderr for row in manifest.rows("train")) == 6


def test_a_killed_rank_ends_the_launch_and_the_same_command_resumes(tmp_path: Path, packed: Path) -> None:
    more = {"train": {"epochs": 12}, "evaluate": {"every_epochs": 12}, "checkpoint": {"every_steps": 1}}
    arguments = ["train", str(write_tiny(tmp_path, packed, name="killed", **more)), "--ranks", "2"]
    command = [sys.executable, "-m", "launch.cli", *arguments]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    run_folder = tmp_path / "runs" / "killed"
    checkpoints = run_folder / "checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("step_*"))) >= 2, deadline_s=120)
    rank_pids = children_running("launch.train", process.pid)
    assert len(rank_pids) == 2
    os.kill(rank_pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert "killed by SIGKILL" in err
    assert "Traceback" not in err.splitlines()[-1]
    wait_for(lambda: not any(alive(pid) for pid in rank_pids), deadline_s=30)
    stopped = load_checkpoint(newest(checkpoints) or Path()).state.step
    done = msmil(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"step {stopped}" in done.stderr
    steps = scalars(run_folder / "tensorboard")["train/loss/total"]
    assert steps == list(range(1, 121)), "a resumed curve has no overlap and no gap"
