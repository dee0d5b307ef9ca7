"""All checks, in the order of their lines."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.doctor.accelerators import check_torch, driver_line
from msmil.engine.doctor.check import Check
from msmil.engine.doctor.child import Answer, ask_module, run
from msmil.engine.doctor.machine import (
    check_cores,
    check_environment,
    check_memory,
    check_open_files,
    check_slurm,
    control_groups,
    read_text,
)
from msmil.engine.doctor.software import check_compiler, check_deepspeed, check_packages, check_python, find_compiler
from msmil.engine.doctor.storage import (
    RUNS_BYTES,
    check_data,
    check_experiment,
    check_folder,
    check_packed_folders,
    check_shared_memory,
    check_temporary,
)
from msmil.engine.environment import default_ranks

_TORCH_S: Final = 240.0  # the first import from a network file system takes minutes
_DEEPSPEED_S: Final = 300.0
_COMMAND_S: Final = 20.0


def examine(file: str | None, overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Look at this machine, and at an experiment if there is one; each line comes as soon as it is known.

    Raises:
        UserError: the configuration itself cannot be read.
    """
    config = Config() if file is None else load_config(file, overrides)
    shards, image_bytes = (None, None) if file is None else check_data(config)
    # what would be found missing twice is looked at once
    arguments = [file, *overrides] if file is not None and shards is not None and shards.state == "ok" else []
    with ThreadPoolExecutor() as pool:
        torch = pool.submit(ask_module, "msmil.engine.doctor.torch_child", arguments, deadline_s=_TORCH_S)
        yield from _software()
        yield from check_torch(torch.result(), driver=_driver(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        answer = torch.result()
        yield from check_deepspeed(partial(_deepspeed, answer), ninja=shutil.which("ninja"))
    yield from _machine(config, default_ranks(int(answer.facts.get("num_gpus", 0))))
    yield check_shared_memory(config, image_bytes)
    yield check_temporary()
    yield check_folder("output_dir", Path(config.output_dir), RUNS_BYTES, "choose another output_dir")
    yield check_environment(config, os.environ)
    if shards is None:
        yield from check_packed_folders(Path())
    else:
        yield shards
    if arguments:
        yield check_experiment(answer.facts.get("experiment", {"error": f"not checked ({answer.failure})"}))
    yield check_slurm(shutil.which("sbatch"), _sinfo(), os.environ.get("SLURM_JOB_ID"))


def _software() -> Iterator[Check]:
    try:
        about = importlib.metadata.metadata("msmil")
        python, packages = about["Requires-Python"], importlib.metadata.requires("msmil") or []
    except importlib.metadata.PackageNotFoundError:
        python, packages = None, None
    yield check_python(python)
    yield check_packages(packages)
    yield check_compiler(find_compiler(os.environ.get("CXX")))


def _machine(config: Config, ranks: int) -> Iterator[Check]:
    groups = control_groups()
    cpu_max, memory_max = ([read_text(folder / name) for folder in groups] for name in ("cpu.max", "memory.max"))
    yield check_cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_max, config, ranks)
    yield check_memory(read_text(Path("/proc/meminfo")), memory_max)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return driver_line(run(query, deadline_s=_COMMAND_S)[0])


def _deepspeed(torch: Answer) -> Answer:
    accelerator = {} if torch.facts.get("num_gpus") else {"DS_ACCELERATOR": "cpu"}
    return ask_module("msmil.engine.doctor.deepspeed_child", deadline_s=_DEEPSPEED_S, **accelerator)


def _sinfo() -> tuple[str, str] | None:
    if shutil.which("sinfo") is None:
        return None
    return run(["sinfo", "--noheader", "--format=%P"], deadline_s=_COMMAND_S)
