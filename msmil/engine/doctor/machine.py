"""Cores, memory, open files, variables of the shell, SLURM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from msmil.config import Config
from msmil.engine.doctor.check import Check, broken, ok, warning
from msmil.engine.environment import refuse_environment
from shards.errors import UserError
from shards.files import human_bytes

_LEAST_MEMORY_BYTES: Final = 4_000_000_000
_LEAST_FILES: Final = 1024


def quota_cores(cpu_max: str) -> float | None:
    """Cores that a control group grants, from the text of its cpu.max; None for no limit.

    >>> quota_cores("150000 100000"), quota_cores("max 100000")
    (1.5, None)
    """
    quota, _, period = cpu_max.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.strip().isdigit() else None


def check_cores(present: int, affinity: int, cpu_max: Sequence[str], config: Config, ranks: int) -> Check:
    """Whether the processes that decode images have a core each.

    Args:
        present: cores of the machine.
        affinity: those that this process may run on (taskset, SLURM).
        cpu_max: texts of that name of its control groups (Docker).
        config: says how many processes decode.
        ranks: that train.
    """
    usable = min([float(affinity), *(quota for text in cpu_max if (quota := quota_cores(text)) is not None)])
    workers = config.data.workers
    text = f"{usable:g} of {present} for this process"
    decode = f"{ranks} ranks with data.workers: {workers} decode in {ranks * workers} processes"
    if workers and ranks * workers > usable:
        fit = max(1, int(usable / ranks))
        more = "ask for more cores (SLURM: --cpus-per-task; Docker: --cpus)"
        return warning("cores", f"{text}; {decode}", f"set data.workers={fit}, or {more}" if fit < workers else more)
    return ok("cores", f"{text}; {decode}")


def check_memory(meminfo: str, limits: Sequence[str]) -> Check:
    """Memory that is available, from the texts of /proc/meminfo and of the control groups' memory.max."""
    rows = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    available = int(rows.get("MemAvailable", "0 kB").split()[0]) * 1024
    available = min([available, *(int(limit) for limit in limits if limit.strip().isdigit())])
    text = f"{human_bytes(available)} available"
    if available < _LEAST_MEMORY_BYTES:
        return warning("memory", text, "end other programs, or ask for more memory (SLURM: --mem; Docker: --memory)")
    return ok("memory", text)


def check_open_files(limit: int) -> Check:
    """Shards, decoding processes and sockets hold files open."""
    if limit < _LEAST_FILES:
        return warning(
            "open files", f"at most {limit}", f"ulimit -n {_LEAST_FILES * 4} in the shell that starts training"
        )
    return ok("open files", f"at most {limit}")


def check_environment(config: Config, environment: Mapping[str, str]) -> Check:
    """Variables with which `msmil train` would refuse to start."""
    try:
        refuse_environment(config.train, environment, clip_grad_norm=config.optim.clip_grad_norm)
    except UserError as error:
        return broken("environment", error.thing, error.fix)
    return ok("environment", "no variable contradicts the configuration")


def check_slurm(sbatch: str | None, sinfo: tuple[str, str] | None, job: str | None) -> Check:
    """Whether there is a cluster that answers; training on this machine needs none.

    Args:
        sbatch: its path, None where it is not there.
        sinfo: what `sinfo --noheader --format=%P` printed and why it failed; None where it is not there.
        job: SLURM_JOB_ID.
    """
    if sbatch is None:
        return ok("SLURM", "none here; a workstation needs none")
    out, failure = sinfo or ("", "there is no sinfo")
    if failure:
        fix = "see sinfo; unset SLURM_CONF if it names another cluster; ask who runs the cluster"
        return warning("SLURM", f"{sbatch} is there, but sinfo does not answer ({failure})", fix)
    inside = "" if job is None else f"; this is job {job}"
    partitions = ", ".join(dict.fromkeys(out.split()))
    return ok("SLURM", f"{sbatch}, partitions {partitions}{inside}")


def control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The folders of this process's control group and of those above it (version 2; the root alone otherwise)."""
    path = next((line[3:] for line in read_text(own).splitlines() if line.startswith("0::")), "/")
    folder = root / path.lstrip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(root))]


def read_text(file: Path) -> str:
    """The text of a file, "" where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
