"""`msmil convert`, and what starts from the folder it writes."""

from __future__ import annotations

import json
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.evaluate import _config
from launch.evaluate import main as evaluate_main
from msmil.config_io import dump_config, load_config
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from msmil.engine.evaluate import find_checkpoint
from msmil.engine.pipeline import build_network
from msmil.engine.preflight import check_experiment
from msmil.engine.run import open_run
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from shards.errors import UserError
from tests.experiments import write_tiny
from tests.msmil.models.published.test_convert import head_only, mammoclip, state

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps its state for the life of a process; each test gets a fresh one, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state_of in (AcceleratorState, PartialState, GradientState):
        state_of._shared_state.clear()


def saved(folder: Path, name: str, content: dict[str, Any]) -> str:
    whole = {key: value.contiguous() for key, value in content.items()}
    beside = {"epoch": 3, "auroc": np.float64(0.5), "dir_path": PosixPath("/a")}
    torch.save({"model": whole, **beside}, folder / name)
    return str(folder / name)


def test_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights" / "b2"
    assert main(["convert", saved(tmp_path, "b2.tar", mammoclip()), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.yaml", "report.txt"}
    weights = load_file(out / "model.safetensors")
    assert weights["backbone.net.conv_stem.weight"].shape == (32, 1, 3, 3)
    config = load_config(out / "config.yaml")
    assert (config.model.backbone, config.model.in_channels) == ("mammoclip_b2", 1)
    assert "500 tensors loaded (1 of them converted), 8 unused" in capsys.readouterr().out
    assert "unused text_encoder.weight [2]: no part of the image encoder" in (out / "report.txt").read_text()


def test_a_head_beside_its_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "settrans"
    encoder = saved(tmp_path, "b2.tar", mammoclip())
    head = saved(tmp_path, "best_model.pth", head_only("fpn_settrans"))
    words = ["data.labels=[Suspicious_Calcification]", "model.in_channels=3"]
    assert main(["convert", head, str(out), "--encoder", encoder, *words]) == 0
    assert "published default taken: instance_encoder = 'fpn'" in capsys.readouterr().out
    config = load_config(out / "config.yaml")
    assert config.data.labels == ("Suspicious_Calcification",)
    assert (config.bags.instances, config.bags.tile_size_px, config.bags.tile_overlap) == ("tiles", 512, 0)
    assert config.model.inducing_points == (38, 32, 20)
    assert config.train.precision == "fp32", "bf16 would give other digits than the published ones"
    with torch.device("meta"):
        network = build_network(config, (1520, 912), pretrained=False)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in load_file(out / "model.safetensors").items()} == shapes


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("fpn_abmil", ["model.mil_encoder=isab"], "config says mil_encoder: 'isab', the keys say 'mlp'"),
        ("head", [], "holds no encoder"),
        ("fpn_abmil", [], "names no labels for its outputs (1)"),
        ("fpn_abmil", ["data.labels=[Mass,Other]"], "has 1 labels, data.labels names ['Mass', 'Other']"),
        ("fpn_abmil", ["model.scales=[128,32,16]"], "the keys say [16, 32, 128]"),
    ],
)
def test_one_clear_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, arguments: list[str], message: str
) -> None:
    tensors = head_only("fpn_abmil") if content == "head" else state(content)
    assert main(["convert", saved(tmp_path, "best_model.pth", tensors), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["convert", str(tmp_path / "none.tar"), str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.fixture
def converted(tmp_path: Path, packed: Path) -> Path:
    """A folder as `msmil convert` writes it, with a small model instead of a published one."""
    config = load_config(write_tiny(tmp_path, packed, seed=3))
    folder = tmp_path / "converted"
    folder.mkdir()
    network = build_network(config, (64, 48), pretrained=False)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_training_starts_from_it(tmp_path: Path, packed: Path, converted: Path) -> None:
    config = load_config(write_tiny(tmp_path, packed, model={"weights": str(converted)}))
    check_experiment(config, 1)
    run = open_run(config, Runtime(config.train))
    expected = load_file(converted / "model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in run.network.state_dict().items())
    run.folder.close()
    assert "starting from" in (run.folder.log).read_text()
    assert "the whole model" in (run.folder.log).read_text()


def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    tmp_path: Path, packed: Path, converted: Path
) -> None:
    config = load_config(write_tiny(tmp_path, packed, model={"weights": str(converted), "scales": [8, 16, 32]}))
    with pytest.raises(UserError, match=r"model\.scales is \(8, 16\) there and \(8, 16, 32\) here"):
        check_experiment(config, 1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("blank_figures")
def test_it_is_evaluated_on_the_data_that_are_named(packed: Path, converted: Path) -> None:
    with pytest.raises(UserError, match=r"no data of their own.*--shards"):
        find_checkpoint(RunFolder(converted), "best", other_data=False)
    evaluate_main(
        _config(str(converted), str(packed), None), str(converted), split="test", checkpoint="best", other_data=True
    )
    results = json.loads((converted / "metrics" / "test.json").read_text())
    assert results["other_data_than_trained_on"] is True
    assert set(results["labels"]) == {"Mass", "Suspicious_Calcification"}


def test_an_encoder_alone_cannot_be_evaluated(packed: Path, converted: Path) -> None:
    weights = load_file(converted / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k.startswith("backbone.")}, converted / "model.safetensors")
    with pytest.raises(UserError, match="an encoder alone, which judges nothing"):
        evaluate_main(
            _config(str(converted), str(packed), None), str(converted), split="test", checkpoint="best", other_data=True
        )


def test_a_checkpoint_of_a_run_is_a_start_too(tmp_path: Path, packed: Path) -> None:
    from msmil.engine.train import train

    config = load_config(write_tiny(tmp_path, packed, train={"epochs": 1}))
    train(config, Runtime(config.train))
    checkpoint = newest(tmp_path / "runs" / "tiny" / "checkpoints")
    assert checkpoint is not None
    again = load_config(write_tiny(tmp_path, packed, name="again", model={"weights": str(checkpoint)}))
    run = open_run(again, Runtime(again.train))
    expected = load_checkpoint(checkpoint).model
    assert all(torch.equal(value, expected[key]) for key, value in run.network.state_dict().items())
    run.folder.close()
