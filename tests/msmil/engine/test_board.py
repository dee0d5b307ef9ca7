"""What TensorBoard gets: the same images each time, curves, histograms, options, charts; nothing twice, no patient."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.board import MOST_RANKS, best_scalars, comparable_options, curves, rank_scalars
from msmil.engine.ddp import DdpEngine
from msmil.engine.evaluate import find_checkpoint, open_evaluation
from msmil.engine.fixed_images import choose_rows
from msmil.engine.pipeline import Pipeline
from msmil.engine.predict import predict_with_losses
from msmil.engine.run import make_loss, open_run
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import open_stream, stepper_of_epoch
from msmil.types import Prediction
from shards.manifest import Manifest, read_manifest
from tests.archives import LABELS
from tests.experiments import write_tiny
from tests.runs import reset, resumed_run

PLUGINS = ("scalars", "images", "histograms", "pr_curves")


class Events:
    """What TensorBoard read of a run: tags by plugin, and values by tag."""

    def __init__(self, folder: Path) -> None:
        self.read = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()

    def tags(self, plugin: str) -> list[str]:
        return sorted(self.read.PluginTagToContent(plugin))

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self.read.Tensors(tag)]

    def values(self, tag: str) -> list[Any]:
        return [make_ndarray(event.tensor_proto) for event in self.read.Tensors(tag)]


def has_box(manifest: Manifest, row: int, label: str) -> bool:
    return any(box.label == label for box in manifest.record(row).boxes)


def test_the_fixed_images_are_half_with_boxes_and_take_turns_over_the_labels(packed: Path) -> None:
    manifest = read_manifest(packed)
    chosen = choose_rows(manifest, "train", LABELS, 8)
    assert chosen.tolist() == choose_rows(read_manifest(packed), "train", LABELS, 8).tolist()
    assert len(set(chosen.tolist())) == 8
    assert set(chosen.tolist()) <= set(manifest.rows("train").tolist())
    for turn, row in enumerate(chosen[:4].tolist()):
        assert has_box(manifest, row, LABELS[turn % 2])
    assert all({manifest.record(row).labels[label] for label in LABELS} == {0} for row in chosen[4:].tolist())
    assert choose_rows(manifest, "train", LABELS, 1).tolist() == chosen[:1].tolist()


def test_a_split_with_fewer_images_or_without_boxes_is_shown_whole(packed: Path) -> None:
    manifest = read_manifest(packed)
    rows = manifest.rows("val")
    assert sorted(choose_rows(manifest, "val", LABELS, 1000)) == rows.tolist()
    boxless = rows[[not manifest.record(row).boxes for row in rows.tolist()]]
    without = manifest.with_rows({"val": boxless}, fingerprint="x")
    assert sorted(choose_rows(without, "val", LABELS, 1000)) == boxless.tolist()
    assert len(choose_rows(manifest.with_rows({"val": rows[:0]}, fingerprint="x"), "val", LABELS, 4)) == 0


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    more = {"loss": {"instance_weight": 0.5, "composite_weight": 0.5}, "tracking": {"images": 4}}
    return resumed_run(tmp_path_factory.mktemp("board"), packed, **more)


@pytest.fixture(scope="module")
def events(resumed: Path) -> Events:
    return Events(resumed / "tensorboard")


def test_a_resumed_run_shows_every_step_once(resumed: Path, events: Events) -> None:
    assert len(list((resumed / "tensorboard").iterdir())) == 2, "an events file of each start"
    validated = events.steps("val/auroc/mean")
    assert len(validated) == 2
    assert events.steps("train/loss/total") == list(range(1, validated[-1] + 1))
    assert events.tags("pr_curves") == [f"precision_recall/{label}" for label in LABELS]
    for plugin in PLUGINS:
        for tag in events.tags(plugin):
            if not tag.startswith(("train/", "best/")):
                assert events.steps(tag) == validated, tag


def test_the_same_images_each_time_and_they_change(events: Events) -> None:
    tags = events.tags("images")
    assert [tag.split("_")[0] for tag in tags] == [f"maps/{number}" for number in (1, 2, 3, 4)]
    assert "Mass" in tags[0]
    assert tags[-1] == "maps/4_negative"
    for tag in tags:
        (width, height, first), (*_, second) = events.values(tag)
        assert first != second
        assert Image.open(io.BytesIO(first)).size == (int(width), int(height))
        assert Image.open(io.BytesIO(first)).format == "JPEG"
        assert len(first) < 60_000


def test_histograms_hold_every_validation_image(events: Events, packed: Path) -> None:
    manifest = read_manifest(packed)
    count = {tag: events.values(tag)[-1][:, 2].sum() for tag in events.tags("histograms")}
    for k, label in enumerate(LABELS):
        label_N = manifest.label_NK(LABELS)[manifest.rows("val"), k]
        assert count[f"probability/{label}_present"] == (label_N == 1).sum()
        assert count[f"probability/{label}_absent"] == (label_N == 0).sum()
        assert count[f"scale_weight/{label}_8"] == count[f"scale_weight/{label}_16"] == len(label_N)


def test_every_chart_finds_its_scalars_and_training_meets_validation(events: Events) -> None:
    scalars = events.tags("scalars")
    layout = layout_pb2.Layout.FromString(events.values("custom_scalars__config__")[-1].item())
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, tag) for tag in scalars), f"{chart.title}: nothing matches {pattern}"
    losses = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    for split in ("train", "val"):
        names = [tag.removeprefix(f"{split}/loss/") for tag in scalars if f"{split}/loss/" in tag]
        assert set(losses) == {name.replace("/", " ") for name in names}
    assert losses["label Mass"] == ["train/loss/label/Mass$", "val/loss/label/Mass$"]


def test_the_options_are_there_with_the_best_metrics(events: Events) -> None:
    content = events.read.PluginTagToContent(metadata.PLUGIN_NAME)
    started = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert started.hparams["optim.lr"].number_value == 1e-3
    assert started.hparams["model.deep_supervision"].bool_value is True
    assert started.hparams["model.scales"].string_value == "[8, 16]"
    ended = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    assert ended.status == 1, "success"
    assert ended.end_time_secs >= started.start_time_secs
    assert events.values("best/auroc")[-1] == max(events.values("val/auroc/mean"))


def test_options_are_those_that_move_a_weight() -> None:
    options = comparable_options(Config(), "0123456789abcdef")
    assert options["data.fingerprint"] == "0123456789ab"
    assert options["model.backbone_options"] == "{}"
    assert options["train.trainable_blocks"] == "all"
    for key in ("name", "output_dir", "data.shards", "data.workers", "tracking.images", "checkpoint.keep_last"):
        assert key not in options


def test_nothing_names_a_patient_or_an_image(resumed: Path, packed: Path) -> None:
    manifest = read_manifest(packed)
    written = b"".join(file.read_bytes() for file in (resumed / "tensorboard").iterdir())
    for column in ("patient_id", "exam_id", "image_id"):
        for name in manifest.text(column, manifest.rows("val")):
            assert name.encode() not in written


def test_the_validation_loss_is_that_of_training_over_all_validation_images(resumed: Path) -> None:
    """Against the formula, from the probabilities of batches that do not divide the images."""
    config = load_config(resumed / "config.yaml", ["evaluate.batch_size=5", "loss.pos_weight=[2, 3]"])
    folder, runtime = RunFolder(resumed), Runtime(config.train)
    checkpoint = find_checkpoint(folder, "latest", other_data=False)
    opened = open_evaluation(config, folder, runtime, checkpoint, other_data=False)
    network, rows = opened.network, opened.pipeline.manifest.rows("val")
    predictions, losses = predict_with_losses(
        opened.pipeline, network, network.scales, rows, make_loss(opened.pipeline)
    )
    reset()

    def expected(label: str, probability: list[float]) -> float:
        target_N = torch.tensor([p.target[label] for p in predictions], dtype=torch.float64)
        weight = torch.tensor({"Mass": 2.0, "Suspicious_Calcification": 3.0}[label])
        logit_N = torch.logit(torch.tensor(probability, dtype=torch.float64))
        return float(bce(logit_N, target_N, pos_weight=weight, reduction="sum")) / (len(rows) * len(LABELS))

    fused = sum(expected(label, [p.probability[label] for p in predictions]) for label in LABELS)
    assert losses["aggregated"] == pytest.approx(fused, rel=1e-4)
    for scale in (8, 16):
        side = sum(expected(label, [p.scale_probability[scale, label] for p in predictions]) for label in LABELS)
        assert losses[f"scale/{scale}"] == pytest.approx(side, rel=1e-4)
    parts = losses["aggregated"] + losses["scale/8"] + losses["scale/16"]
    assert losses["total"] == pytest.approx(parts + 0.5 * losses["instance"] + 0.5 * losses["composite"], rel=1e-5)
    assert losses["total"] == pytest.approx(sum(losses[f"label/{label}"] for label in LABELS), rel=1e-5)


def predictions(target: list[int], **more: Any) -> list[Prediction]:
    rng = np.random.default_rng(0)
    return [Prediction(f"i{i}", "e", "p", {"Mass": t}, {"Mass": rng.random()}, {}, {}) for i, t in enumerate(target)]


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ([0, 0], {"probability/Mass_absent"}),
        ([1, 1], {"probability/Mass_present"}),
        ([-1, -1], set()),
        ([], set()),
        ([0, 1, -1], {"probability/Mass_absent", "probability/Mass_present", "precision_recall/Mass"}),
    ],
)
def test_what_is_undefined_is_absent(target: list[int], shown: set[str]) -> None:
    found = [value.tag for one in curves(predictions(target), ["Mass"], [8]) for value in one.value]
    assert set(found) == shown
    assert best_scalars({"val/auroc/Other": 0.7}, ["Mass"]) == {}


def test_ranks_are_shown_one_by_one_up_to_a_number() -> None:
    assert rank_scalars([0.5]) == {}
    few = rank_scalars([0.1, 0.3])
    assert few["ranks/seconds/rank_1"] == few["ranks/seconds/max"] == 0.3
    assert few["ranks/seconds/mean"] == pytest.approx(0.2)
    many = rank_scalars([0.1] * MOST_RANKS + [0.7])
    assert set(many) == {"ranks/seconds/min", "ranks/seconds/mean", "ranks/seconds/max", "ranks/slowest"}
    assert many["ranks/slowest"] == MOST_RANKS


def test_a_rank_counts_its_own_work_and_not_its_waiting_for_others(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last backward of a step the ranks wait for the slowest of them."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = load_config(write_tiny(tmp_path, packed, train={"accumulation": 2}))
    runtime = Runtime(config.train)
    run = open_run(config, runtime)
    stepper = stepper_of_epoch(run, 0)
    batches, timer = open_stream(run, 0), PhaseTimer(runtime.synchronize)
    bag, backward = Pipeline.bag, DdpEngine.backward

    def slow_bag(self: Pipeline, *args: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return bag(self, *args, **named)

    def waiting(self: DdpEngine, loss: Any) -> None:
        time.sleep(0.4)
        backward(self, loss)

    monkeypatch.setattr(Pipeline, "bag", slow_bag)
    monkeypatch.setattr(DdpEngine, "backward", waiting)
    timer.start(exact=True)
    (own_s,) = stepper(batches, epoch=0, step=0, timer=timer).own_s
    assert own_s > 2 * 0.1 + 0.4, "two micro-steps"
    assert timer.total_s - own_s > 0.4, "and the last backward apart"
    timer.start(exact=False)
    assert stepper(batches, epoch=0, step=1, timer=timer).own_s == ()
    assert run.tracker is not None
    run.tracker.close()
    run.folder.close()
    reset()
