"""`msmil export`, and what starts from the folder it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main
from launch.evaluate import _config
from launch.evaluate import main as evaluate_main
from msmil.config_io import load_config
from msmil.engine.run import open_run
from msmil.engine.runtime import Runtime
from tests.experiments import write_tiny
from tests.msmil.engine.test_export import a_run
from tests.runs import reset

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()


def test_the_command(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, packed)
    assert main(["export", str(run.root), "--format", "torch-export"]) == 0
    out = run.root / "export"
    assert {one.name for one in out.iterdir()} == {"model.safetensors", "config.yaml", "export.json", "model.pt2"}
    said = capsys.readouterr().out
    assert "weights of step_00000001" in said
    assert "model.pt2: differs from the model by at most" in said
    assert main(["export", str(run.root), "--checkpoint", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert main(["export", str(run.root), "--out", str(run.root)]) == 2
    assert "msmil: error:" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_it_is_judged_as_the_run_is(tmp_path: Path, packed: Path) -> None:
    run, out = a_run(tmp_path, packed), tmp_path / "out"
    assert main(["export", str(run.root), "--out", str(out)]) == 0
    for folder, shards in ((run.root, None), (out, str(packed))):
        reset()
        config = _config(str(folder), shards, None)
        evaluate_main(config, str(folder), split="test", checkpoint="best", other_data=shards is not None)
    ours, theirs = ((folder / "predictions" / "test.csv").read_text() for folder in (out, run.root))
    assert ours == theirs


def test_a_training_starts_from_it(tmp_path: Path, packed: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(a_run(tmp_path, packed).root), "--out", str(out)]) == 0
    config = load_config(write_tiny(tmp_path, packed, name="again", model={"weights": str(out)}))
    run = open_run(config, Runtime(config.train))
    expected = load_file(out / "model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in run.network.state_dict().items())
    run.folder.close()
