"""Training in this process: every option does what it says, and a resumed run equals an unbroken one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest, pointed
from msmil.engine.evaluate import evaluate, evaluated_weights
from msmil.engine.run import open_run
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.engine.train import train
from shards.errors import UserError
from shards.pack import pack
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table
from tests.archives import make_grouped_archive
from tests.experiments import write_tiny

pytestmark = pytest.mark.slow

State = dict[str, torch.Tensor]
Train = Callable[..., tuple[State, State]]


@pytest.fixture(autouse=True)
def _one_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state for the life of a process; each test gets a fresh one, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    reset()


def reset() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


@pytest.fixture
def train_tiny(tmp_path: Path, packed: Path) -> Train:
    """Train the small experiment with changes; its weights before and after."""

    def run(**sections: Any) -> tuple[State, State]:
        config = load_config(write_tiny(tmp_path, packed, **sections))
        reset()
        opened = open_run(replace(config, name=f"{config.name}_untrained"), Runtime(config.train))
        before = {key: value.clone() for key, value in opened.network.state_dict().items()}
        reset()
        train(config, Runtime(config.train))
        return before, load_checkpoint(checkpoint_of(config)).model

    return run


def checkpoint_of(config: Config) -> Path:
    folder = newest(RunFolder(f"{config.output_dir}/{config.name}").checkpoints)
    assert folder is not None
    return folder


def moved(before: State, after: State) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def is_statistic(key: str) -> bool:
    return "running_" in key or key.endswith("num_batches_tracked")


def test_everything_trains_and_frozen_statistics_stay(train_tiny: Train) -> None:
    before, after = train_tiny()
    assert moved(before, after) == {key for key in before if not is_statistic(key)}


def test_statistics_move_when_they_shall(train_tiny: Train) -> None:
    before, after = train_tiny(train={"batch_norm": "train", "epochs": 1}, data={"last_batch": "drop"})
    assert {key for key in before if "running_" in key} <= moved(before, after)


def test_a_frozen_encoder_does_not_move(train_tiny: Train) -> None:
    before, after = train_tiny(train={"encoder": "frozen", "epochs": 1})
    assert moved(before, after) == {key for key in before if not key.startswith("backbone.")}


def test_only_the_last_blocks_train(train_tiny: Train) -> None:
    before, after = train_tiny(train={"trainable_blocks": 1, "epochs": 1})
    backbone = {key for key in moved(before, after) if key.startswith("backbone.")}
    assert backbone
    assert len({key.rsplit(".", 2)[0] for key in backbone}) < len({k.rsplit(".", 2)[0] for k in before})
    assert all("layer3" in key for key in backbone), "stride 16 is the deepest map, made by layer3"


def test_heads_warm_up_before_the_backbone_trains(train_tiny: Train, tmp_path: Path) -> None:
    before, after = train_tiny(train={"head_warmup_epochs": 1, "epochs": 2})
    assert moved(before, after) == {key for key in before if not is_statistic(key)}
    first = load_checkpoint(sorted((tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*"))[0])
    assert not any(key.startswith("backbone.") for key in moved(before, first.model))
    last = load_checkpoint(sorted((tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*"))[-1])
    steps = {key: int(value) for key, value in last.optimizer.items() if key.endswith("/step")}
    assert {steps[key] for key in steps if key.startswith("backbone.")} == {first.state.step}
    assert {steps[key] for key in steps if not key.startswith("backbone.")} == {2 * first.state.step}


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"channels_last": False, "epochs": 1}},
        {"train": {"epochs": 1}, "data": {"last_batch": "drop"}},
        {"train": {"epochs": 1}, "model": {"in_channels": 3}},
        {"train": {"epochs": 1}, "model": {"mil_encoder": "isab", "pooling": "pma"}},
        {"train": {"epochs": 1}, "model": {"mil_encoder": "sab", "encoder_layer_norm": True}},
        {"train": {"epochs": 1}, "model": {"attention": "shared", "deep_supervision": False}},
        {"train": {"epochs": 1}, "bags": {"instances": "tiles", "tile_size_px": 32, "tile_overlap": 0.5}},
    ],
    ids=lambda sections: "-".join(f"{k}.{v}" for k, s in sections.items() for v in s if v != "epochs"),
)
def test_an_option_trains(train_tiny: Train, sections: dict[str, Any]) -> None:
    before, after = train_tiny(**sections)
    assert all(value.isfinite().all() for value in after.values())
    assert any(key.startswith("backbone.") for key in moved(before, after))


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"clip_grad_norm": 0.01}},
        {"optim": {"weight_decay": 0.5}},
        {"optim": {"backbone_lr_factor": 0.1}},
        {"loss": {"pos_weight": [2, 3]}},
        {"loss": {"instance_weight": 1.0, "composite_weight": 1.0}},
        {"loss": {"uniform_attention_share": 0.5}},
        {"bags": {"local_contrast": 2.0}},
        {"bags": {"augment": {"gain": 0.2}}},
        {"model": {"attention_dropout": 0.5}},
        {"train": {"precision": "bf16", "epochs": 1}},
        {"seed": 11},
    ],
    ids=lambda sections: "-".join(f"{k}.{v}" for k, v in sections.items()),
)
def test_an_option_changes_what_is_learned(train_tiny: Train, sections: dict[str, Any]) -> None:
    _, default = train_tiny(name="default", train={"epochs": 1})
    _, changed = train_tiny(name="changed", **({"train": {"epochs": 1}} | sections))
    assert moved(default, changed)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"workers": 2}},
        {"evaluate": {"batch_size": 3}},
        {"checkpoint": {"every_steps": 3}},
        {"tracking": {"images": 2}},
    ],
)
def test_an_option_changes_nothing_that_is_learned(train_tiny: Train, sections: dict[str, Any]) -> None:
    _, default = train_tiny(name="default", train={"epochs": 1})
    _, changed = train_tiny(name="changed", train={"epochs": 1}, **sections)
    assert not moved(default, changed)


def test_the_compiled_model_trains_alike(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo and AOT autograd; inductor's C++ is torch's own affair and takes minutes to compile."""
    _, eager = train_tiny(train={"epochs": 1}, name="eager")
    compiled_models = []

    def traced(model: Any) -> Any:
        compiled_models.append(model)
        return compile_model(model, backend="aot_eager")

    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    _, compiled = train_tiny(train={"epochs": 1, "compile": True}, name="compiled")
    assert len(compiled_models) == 1
    assert all(torch.allclose(eager[key], compiled[key], atol=1e-4) for key in eager)


def test_gradient_checkpointing_changes_nothing(train_tiny: Train, tmp_path: Path) -> None:
    model = {"backbone": "efficientnet_b0", "backbone_options": {}, "drop_path_rate": 0.2}
    _, plain = train_tiny(model=model, train={"epochs": 1}, name="plain")
    _, saved = train_tiny(model=model, train={"epochs": 1, "gradient_checkpointing": True}, name="saving")
    assert all(torch.allclose(plain[key], saved[key], atol=1e-6) for key in plain)


@pytest.mark.parametrize("cut", [{"every_steps": 7}, {"every_steps": 10}])
def test_a_resumed_run_equals_an_unbroken_one(
    train_tiny: Train, tmp_path: Path, packed: Path, cut: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {
        "model": {"encoder_dropout": 0.3, "attention_dropout": 0.3},
        "bags": {"augment": {"rotation_deg": 10, "gamma": 0.2, "noise_sd": 0.05}},
        "data": {"last_batch": "drop"},
        "train": {"epochs": 2, "accumulation": 2, "ema_decay": 0.9, "batch_norm": "train"},
        "checkpoint": {**cut, "keep_last": 9},
    }
    _, unbroken = train_tiny(name="unbroken", **sections)
    config = load_config(write_tiny(tmp_path, packed, name="broken", **sections))

    class Killed(BaseException):
        pass

    def killed(run: Any) -> None:
        _save(run)
        if run.state.step == cut["every_steps"]:
            raise Killed

    from msmil.engine import train as module

    _save = module.save
    reset()
    runtime = Runtime(config.train)
    monkeypatch.setattr(module, "save", killed)
    with pytest.raises(Killed):
        train(config, runtime)
    monkeypatch.setattr(module, "save", _save)
    assert load_checkpoint(checkpoint_of(config)).state.step == cut["every_steps"]
    reset()
    train(config, Runtime(config.train))
    resumed = load_checkpoint(checkpoint_of(config))
    assert not moved(unbroken, resumed.model)
    whole = load_checkpoint(checkpoint_of(replace(config, name="unbroken")))
    assert resumed.state == whole.state
    assert resumed.ema is not None
    assert whole.ema is not None
    assert not moved(whole.ema, resumed.ema)


def test_averaged_weights_are_what_is_evaluated(train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(train={"epochs": 1, "ema_decay": 0.9})
    saved = load_checkpoint(newest(tmp_path / "runs" / "tiny" / "checkpoints") or Path())
    assert evaluated_weights(saved).keys() == saved.model.keys()
    assert moved(saved.model, evaluated_weights(saved))


def test_other_data_are_refused(train_tiny: Train, tmp_path: Path, packed: Path) -> None:
    train_tiny(train={"epochs": 1})
    folder = tmp_path / "runs" / "tiny"
    state = newest(folder / "checkpoints") or Path()
    content = json.loads((state / "state.json").read_text())
    content["train_state"]["data_fingerprint"] = "another"
    (state / "state.json").write_text(json.dumps(content))
    config = load_config(folder / "config.yaml")
    reset()
    with pytest.raises(UserError, match="fingerprint another"):
        train(config, Runtime(config.train))


def test_the_best_step_is_the_one_with_the_highest_mean_auroc(train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(train={"epochs": 4}, optim={"lr": 3e-3}, checkpoint={"keep_last": 9})
    root = tmp_path / "runs" / "tiny" / "checkpoints"
    states = [load_checkpoint(folder).state for folder in sorted(root.glob("step_*"))]
    metrics = [state.best_metric for state in states]
    assert all(metric is not None for metric in metrics)
    assert metrics == sorted(metrics, key=lambda metric: metric or 0)
    best = pointed(root, "best")
    assert best is not None
    assert best.name == f"step_{states[-1].best_step:08d}"
    assert load_checkpoint(best).state.best_step == states[-1].best_step


def test_a_label_without_positives_is_trained_with_weight_1_and_a_warning(tmp_path: Path) -> None:
    rows = make_grouped_archive(tmp_path / "archive", exams=24)
    table = read_grouped_table(rows.table, rows.images)
    pack(table, tmp_path / "shards", recipe=AsIs(), labels=("Mass", "Skin_Retraction"), processes=1, quiet=True)
    config = load_config(
        write_tiny(tmp_path, tmp_path / "shards", data={"labels": ["Mass", "Skin_Retraction"]}, train={"epochs": 1})
    )
    state = train(config, Runtime(config.train))
    log = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert "WARNING" in log
    assert "Skin_Retraction 1" in log
    assert state.best_metric is not None, "the label that has an AUROC decides"


@pytest.mark.parametrize("name", ["best", "step_00000099"])
def test_evaluating_without_that_checkpoint_is_refused(tmp_path: Path, packed: Path, name: str) -> None:
    config = load_config(write_tiny(tmp_path, packed))
    folder = RunFolder(tmp_path / "runs" / "tiny")
    folder.open(world=1, device="CPU")
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(config, folder, Runtime(config.train), split="test", checkpoint=name)
