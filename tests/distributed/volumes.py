"""A rank that writes which collectives a step of each engine calls, and what the formulas say of them.

Its argument is a JSON file of [{"config": file, "out": file, "threshold": see tests.distributed.legs}, ...].
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from msmil.config_io import load_config
from msmil.engine import runtime as runtime_module
from msmil.engine.bench.collectives import as_traffic, seconds_alone
from msmil.engine.bench.projection import traffic
from msmil.engine.bench.scaling import (
    calls_of_a_step,
    engine_of,
    make_stepper,
    one_batch_again_and_again,
    parameters_in,
)
from msmil.engine.pipeline import open_pipeline
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer

_CONFIG = runtime_module.deepspeed_config


def main(file: str) -> None:
    for leg in json.loads(Path(file).read_text()):
        look(leg)


def look(leg: dict[str, Any]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[variable]

    def configured(*arguments: Any, **more: Any) -> dict[str, Any]:
        made = _CONFIG(*arguments, **more)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = leg["threshold"]
        return made

    runtime_module.deepspeed_config = configured
    config = load_config(leg["config"])
    runtime = Runtime(config.train)
    pipeline = open_pipeline(config, runtime)
    stepper = make_stepper(pipeline)
    sizes = parameters_in(make_bare(pipeline), config.optim, threshold=leg["threshold"])
    batches = one_batch_again_and_again(pipeline)
    for _ in range(2):
        stepper(batches, epoch=0, step=0, timer=PhaseTimer(runtime.synchronize))
    calls = calls_of_a_step(stepper, batches)
    told = {
        "counted": [asdict(part) for part in as_traffic(calls)],
        "formula": [asdict(part) for part in traffic(engine_of(config), sizes, config.train.accumulation)],
        "seconds_alone": seconds_alone(calls, runtime, repeats=1),
    }
    if runtime.is_main:
        Path(leg["out"]).write_text(json.dumps(told))
    runtime.barrier()


def make_bare(pipeline: Any) -> Any:
    """The network as the stepper trains it, undivided."""
    from msmil.engine.pipeline import build_network
    from msmil.models.backbone import set_trainable

    network = build_network(pipeline.config, pipeline.image_hw, pretrained=False)
    set_trainable(network, "all")
    return network


if __name__ == "__main__":
    main(sys.argv[1])
