"""A name started again with other options: the folder states what was trained, and mixes no two configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import msmil.engine.train as engine
from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from tests.experiments import write_tiny
from tests.runs import Killed, reset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu")]

SHORT: dict[str, Any] = {"evaluate": {"every_epochs": 9}, "optim": {"warmup_epochs": 0}}


@pytest.fixture
def config(tmp_path: Path, packed: Path) -> Path:
    """An experiment of one epoch."""
    return write_tiny(tmp_path, packed, train={"epochs": 1}, **SHORT)


def train(config: Config) -> None:
    reset()
    engine.train(config, Runtime(config.train, quiet=True))


def shown_configurations(folder: RunFolder) -> list[bytes]:
    """The texts that TensorBoard shows."""
    events = EventAccumulator(str(folder.tensorboard), size_guidance={"tensors": 0}).Reload()
    return [event.tensor_proto.string_val[0] for event in events.Tensors("configuration/text_summary")]


def test_a_finished_run_states_the_options_that_trained_it(config: Path, tmp_path: Path) -> None:
    train(load_config(config))
    folder = RunFolder(tmp_path / "runs" / "tiny")
    stated, shown = folder.config.read_bytes(), shown_configurations(folder)
    train(load_config(config, ["optim.lr=0.5"]))
    assert "already trained" in folder.log.read_text()
    assert folder.config.read_bytes() == stated
    assert load_config(folder.config).optim.lr == 1e-3
    assert shown_configurations(folder) == shown
    assert len(shown) == 1


def test_a_run_that_goes_on_states_what_it_goes_on_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine.save

    def killed_behind_it(run: Any) -> None:
        save(run)
        engine.finish_saving(run)
        raise Killed

    midway = ["checkpoint.every_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", killed_behind_it)
        with pytest.raises(Killed):
            train(load_config(config, midway))
    train(load_config(config, [*midway, "optim.lr=0.5"]))
    folder = RunFolder(tmp_path / "runs" / "tiny")
    assert load_config(folder.config).optim.lr == 0.5
    assert len(shown_configurations(folder)) == 2
