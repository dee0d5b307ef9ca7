"""What the shell and the machine say before anything starts; imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from msmil.config import TrainConfig
from shards.errors import UserError

_CPU_RANKS: Final = 2
# `accelerate launch` sets these values itself when nobody chose anything
_SAYS_NOTHING: Final = {"", "no", "false", "0", "none"}
_OTHER_ENGINES: Final = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_CLIPPING: Final = "ACCELERATE_GRADIENT_CLIPPING"


def refuse_environment(
    config: TrainConfig, environment: Mapping[str, str] = os.environ, *, clip_grad_norm: float | None = None
) -> None:
    """Refuse variables through which an accelerate config file would make the recorded configuration untrue.

    Clipping is compared where optim.clip_grad_norm is given. `no` says nothing: accelerate sets it where nobody chose.

    Raises:
        UserError: a variable contradicts the configuration; both values are named.
    """
    said = {key: value for key, value in environment.items() if value.lower() not in _SAYS_NOTHING}

    def refuse(variable: str, key: str, value: object) -> None:
        fix = f"leave it out of the accelerate config file and the shell, or change {key} in the experiment"
        raise UserError(f"{variable}={said[variable]} contradicts {key}: {value}", fix=fix)

    for variable, engine in _OTHER_ENGINES.items():
        if variable in said and engine != config.engine:
            refuse(variable, "train.engine", config.engine)
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    if said.get("ACCELERATE_MIXED_PRECISION", precision).lower() != precision:
        refuse("ACCELERATE_MIXED_PRECISION", "train.precision", config.precision)
    steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if said.get(steps, str(config.accumulation)) != str(config.accumulation):
        refuse(steps, "train.accumulation", config.accumulation)
    if "ACCELERATE_DYNAMO_BACKEND" in said:
        refuse("ACCELERATE_DYNAMO_BACKEND", "train.compile", config.compile)
    same = {str(clip_grad_norm), f"{clip_grad_norm or 0:g}"}  # 1.0 and 1
    if clip_grad_norm is not None and said.get(_CLIPPING, str(clip_grad_norm)) not in same:
        refuse(_CLIPPING, "optim.clip_grad_norm", clip_grad_norm)
    if config.engine == "deepspeed":
        for variable, (key, value) in _of_deepspeed(config).items():
            if variable in said and said[variable] != value:
                refuse(variable, key, getattr(config, key.rpartition(".")[2]))


def _of_deepspeed(config: TrainConfig) -> dict[str, tuple[str, str | None]]:
    """What an accelerate file with a section on DeepSpeed may say: for each variable a key and its value there."""
    offload = "cpu" if config.offload_optimizer else None
    return {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("train.zero_stage", str(config.zero_stage)),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("train.offload_optimizer", offload),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("train.offload_optimizer", None),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("train.engine", None),
    }


def require_engine(config: TrainConfig) -> None:
    """Refuse an engine that is not installed.

    Raises:
        UserError: a package is missing.
    """
    if config.engine != "deepspeed":
        return
    for package in ("deepspeed", "transformers"):  # accelerate asks for the version of transformers, whoever trains
        if importlib.util.find_spec(package) is None:
            fix = "pip install 'msmil[deepspeed]', or set train.engine: ddp"
            raise UserError(f"train.engine is deepspeed, but {package} is not installed", fix=fix)


def without_engine(config: TrainConfig) -> TrainConfig:
    """The same for ranks that train nothing: whole weights on each, whatever trained them."""
    return replace(config, engine="ddp", zero_stage=TrainConfig.zero_stage, offload_optimizer=False)


def default_ranks(num_gpus: int) -> int:
    """One rank per GPU; on a machine without any, two CPU ranks (one on a single core)."""
    return num_gpus or min(_CPU_RANKS, os.cpu_count() or 1)


def task_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the variables of an srun task mean in torch's words; empty where there is one task, or a launcher said it.

    The first host of the step holds the meeting point, on a port that follows from the job and the step; it is below
    those that Linux gives to connections (32768), and jobs that share a machine have one each.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    port = 20_000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", "0"))) % 12_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """The first one of SLURM's compressed lists: `gpu[03-05,9],cpu1` begins with gpu03."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert entry is not None, f"an empty list of nodes: {nodes!r}"
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0])
