"""`msmil train` and `msmil evaluate` run whatever makes the instances, and say where there is no map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msmil.config_io import load_config
from msmil.engine.evaluate import evaluate
from msmil.engine.preflight import check_experiment
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.engine.train import train
from tests.experiments import write_tiny
from tests.runs import reset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu", "blank_figures")]

TILES = {"instances": "tiles", "tile_size_px": 32}
MIXED = {"pooling": "mean", "region_pooling": "attention", "probability": "entmax_alpha", "mil_encoder": "isab"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "single": (
        {"instance_encoder": "single", "scales": [24], "probability": "sparsemax"},
        {"instance_weight": 0.5},
        {"merged", "attention_24", "instance_24"},
    ),
    "msp": (
        {"instance_encoder": "msp", "scales": [16, 24], "scale_aggregator": "max_p"},
        {"uniform_attention_share": 0.5},
        {"merged", "attention_16", "attention_24", "instance_16", "instance_24"},
    ),
    "nested": (
        {"nested": True, "scale_aggregator": "concatenation"},
        {},
        {"merged", "attention_8", "attention_16"},
    ),
    "nested_mixed": (
        {"nested": True, "instance_encoder": "backbone_pyramid", "scale_aggregator": "mean_p", **MIXED},
        {},
        {"merged", "attention_8", "attention_16"},
    ),
    "mean": ({"pooling": "mean"}, {}, {"merged", "instance_8", "instance_16"}),
    "no_maps": ({"pooling": "max", "deep_supervision": False}, {}, set()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_variant_trains_and_is_evaluated(name: str, tmp_path: Path, packed: Path) -> None:
    model, loss, maps = CASES[name]
    overlap = {"tile_overlap": 0.5} if name in ("single", "nested") else {}
    sections = {"train": {"epochs": 1}, "optim": {"warmup_epochs": 0}, "tracking": {"images": 1}}
    file = write_tiny(tmp_path, packed, model=model, loss=loss, bags=TILES | overlap, **sections)
    config = load_config(file)
    check_experiment(config, world=1)
    train(config, Runtime(config.train))
    reset()
    folder = RunFolder(tmp_path / "runs" / "tiny")
    evaluate(config, folder, Runtime(config.train), split="test", checkpoint="latest")
    results = json.loads((folder.metrics / "test.json").read_text())
    located = results["localisation"]
    assert set(located["Mass"] if located else {}) == maps
    assert ("this model has no maps" in folder.log.read_text()) == (not maps)
    assert (folder.figures / "test_Mass_maps.png").exists() == bool(maps)
    assert len(EventAccumulator(str(folder.tensorboard)).Reload().Tags()["images"]) == bool(maps)
    scales = results["labels"]["Mass"]["scales"]
    assert set(scales) == ({str(s) for s in config.model.scales} if name not in ("single", "no_maps") else set())
