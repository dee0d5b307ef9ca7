"""Every experiment of configs/experiment: it says its command, it builds at its real size, and a small one trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from launch.cli import parse
from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.extract import Storage, extract
from msmil.engine.pipeline import build_network
from msmil.engine.run import Run, open_run
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import open_stream, stepper_of_epoch
from msmil.models.backbone import set_trainable
from tests.archives import LABELS
from tests.experiments import TINY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs" / "experiment").rglob("*.yaml"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
PAPER = [name for name in NAMES if "/paper/" in name]
STORED_HW = (1520, 912)
SMALL_SIZES = {1: [16], 3: [16, 24, 32]}  # of tiles that are instances, by the number of scales


@pytest.fixture
def _one_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state for the life of a process; each test gets a fresh one, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    states: tuple[Any, ...] = (AcceleratorState, PartialState, GradientState)
    for state in states:
        state._shared_state.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in states:
        state._shared_state.clear()


def shrunk(name: str, shards: Path, folder: Path) -> Config:
    """The experiment with its choices, but with small images, tiles and widths; it takes one step per epoch."""
    tree = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    model, bags = tree["model"], tree.get("bags", {})
    pyramid = model.get("instance_encoder", "fpn") in ("fpn", "backbone_pyramid")
    model |= {"backbone": "resnet10t", "pretrained": False, "weights": "", "drop_path_rate": 0.0, "encoder_dim": 16}
    model["backbone_options"] = TINY["model"]["backbone_options"]
    model["scales"] = [8, 16, 32] if pyramid else SMALL_SIZES[len(model["scales"])]
    if pyramid:
        model |= {"fpn_dim": 16, "attention_dim": 8}
    tree["bags"] = bags | {"pad_multiple_px": 32, "tile_size_px": 32}
    labels = [label for label in tree["data"]["labels"] if label in LABELS]
    tree["data"] |= {"shards": str(shards), "labels": labels, "workers": 0, "last_batch": "drop"}
    tree["train"] |= {"precision": "fp32", "trainable_blocks": "all", "head_warmup_epochs": 0, "batch_size": 4}
    tree["optim"] = tree.get("optim", {}) | {"warmup_epochs": 0}
    if tree["data"].get("features"):
        tree["data"]["features"] = str(folder / "features")
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(tree | {"output_dir": str(folder / "runs")}), encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_the_command_that_runs_it(name: str) -> None:
    head, empty, *_ = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert head.startswith("# msmil ")
    assert empty == "#"
    assert callable(parse(head.removeprefix("# msmil ").split()).run)
    assert name in head or head == "# msmil demo"


def test_names_of_runs_are_those_of_their_files() -> None:
    for name in NAMES:
        prefix = "paper_" if name in PAPER else ""
        assert load_config(ROOT / name).name == prefix + Path(name).stem


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_at_its_real_size(name: str) -> None:
    config = load_config(ROOT / name)
    with torch.device("meta"):
        network = build_network(config, STORED_HW, pretrained=False)
    set_trainable(network, config.train.trainable_blocks)
    assert network.scales == config.model.scales


POS_WEIGHTS = {"Mass": 15.573306370070778, "Suspicious_Calcification": 37.296728971962615}


def test_every_row_of_the_paper_is_there_for_both_labels() -> None:
    fpn = [f"fpn_{mil}{end}" for mil in ("abmil", "settrans") for end in ("", "_mean_p", "_concatenation")]
    rows = ["single_abmil", "single_settrans", *fpn]
    best = {"mass": "abmil", "calcification": "settrans"}  # the paper's ablations take each label's better half
    for label, mil in best.items():
        expected = {f"{label}_{row}" for row in (*rows, f"msp_{mil}", f"backbone_pyramid_{mil}", f"nested_{mil}")}
        assert {Path(name).stem for name in PAPER if f"/{label}_" in name} == expected


def test_rows_of_the_paper_share_its_recipe() -> None:
    """Section "Recipe" of the published README, with its training mode `finetune`."""
    for name in PAPER:
        config = load_config(ROOT / name)
        model, train, optim, data, bags = config.model, config.train, config.optim, config.data, config.bags
        (label,) = data.labels
        assert label == ("Mass" if "/mass_" in name else "Suspicious_Calcification")
        assert (data.folds, data.fold, data.fold_rule, data.last_batch) == (5, 0, "legacy", "drop")
        assert (bags.instances, bags.tile_size_px, bags.tile_overlap) == ("tiles", 512, 0)
        assert bags.augment.horizontal_flip == bags.augment.vertical_flip == 0
        assert (model.backbone, model.drop_path_rate, train.trainable_blocks) == ("mammoclip_b2", 0.2, 8)
        assert (train.epochs, train.batch_size, optim.lr, optim.weight_decay, optim.warmup_epochs) == (
            30,
            8,
            5e-5,
            1e-4,
            1,
        )
        assert (config.seed, config.loss.pos_weight) == (10, (POS_WEIGHTS[label],))
        assert (model.encoder_dim, model.fpn_dim) == (256, 256)
        transformer = (model.mil_encoder, model.pooling, model.encoder_blocks, model.encoder_heads, model.pma_heads)
        if "settrans" in name:
            assert (*transformer, model.encoder_layer_norm) == ("isab", "pma", 2, 4, 1, True)
        else:
            assert transformer[:2] == ("mlp", "gated_attention")
            assert model.encoder_dropout == model.attention_dropout == 0.25
        assert model.deep_supervision


@pytest.mark.usefixtures("_one_world")
@pytest.mark.parametrize("name", NAMES)
def test_a_small_one_takes_a_training_step(name: str, tmp_path: Path, packed: Path) -> None:
    config = shrunk(name, packed, tmp_path)
    runtime = Runtime(config.train)
    if config.data.features:
        extract(config, Path(config.data.features), runtime, Storage(dtype="fp32", zstd=False, images_per_shard=16))
    run = open_run(config, runtime)
    before = {key: value.clone() for key, value in run.network.state_dict().items()}
    loss = first_step(run)
    assert math.isfinite(loss)
    assert loss > 0
    after = run.network.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    kept = {"backbone"} if config.train.encoder == "frozen" else set()
    assert moved == {key.split(".")[0] for key in before} - kept, "every part that is not frozen trains"


def first_step(run: Run) -> float:
    run.stepper = stepper_of_epoch(run, 0)
    timer = PhaseTimer(run.pipeline.runtime.synchronize)
    report = run.stepper(open_stream(run, 0), epoch=0, step=0, timer=timer)
    assert run.tracker is not None
    run.tracker.close()
    run.folder.close()
    return report.losses["total"]
