"""A run as it looks after an accident: killed between its last validation and the save, then gone on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import msmil.engine.train as engine
from msmil.config_io import load_config
from msmil.engine.runtime import Runtime
from tests.experiments import write_tiny


class Killed(BaseException):
    """What nothing catches."""


def reset() -> None:
    """Accelerate keeps its state for the life of a process, and writes DeepSpeed into the environment."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def resumed_run(folder: Path, packed: Path, **sections: Any) -> Path:
    """Train the small experiment for two epochs in this process, on a CPU; its second epoch is trained twice."""
    config = load_config(write_tiny(folder, packed, **sections))
    save = engine.save
    saves = 0

    def killed_at_the_second(run: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise Killed
        save(run)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        reset()
        with patch.context() as inner:
            inner.setattr(engine, "save", killed_at_the_second)
            with pytest.raises(Killed):
                engine.train(config, Runtime(config.train))
        reset()
        engine.train(config, Runtime(config.train))
        reset()
    torch.set_num_threads(threads)
    return Path(config.output_dir) / config.name
