"""What docs/clusters.md says of SLURM, under a real one with two nodes on this machine (CPUs, gloo).

Its nodes share one address, and it has no GPUs.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from tests.cluster.slurm import Cluster, Ended, missing
from tests.docs.pages import commands
from tests.experiments import write_tiny
from tests.faults.experiments import ON, write_full
from tests.faults.launcher import digests, poll
from tests.worlds import wait_for, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 200
SPREAD = ("--nodes=2", "--ntasks=2")
TOGETHER = ("--nodes=1", "--ntasks=2")
AT_ONCE = "--kill-on-bad-exit=1"  # what a cluster may have as its default (KillOnBadExit)


def srun(*arguments: object, module: str = "launch.train", options: tuple[str, ...] = ()) -> str:
    """The line of the page with another program or experiment; options that are said again win."""
    (line,) = [line for line in commands("docs/clusters.md") if line.startswith("srun ")]
    words = shlex.split(line)
    python = words.index("python")
    assert words[python : python + 3] == ["python", "-m", "launch.train"]
    return shlex.join([*words[:python], *options, sys.executable, "-m", module, *map(str, arguments)])


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(folder.name.removeprefix("step_")) for folder in run.glob("checkpoints/step_*")), default=0)


def stopped_once(ended: Ended, signum: signal.Signals, run: Path) -> bool:
    """The exit code says which signal it was, one rank says behind which step, and that step is saved."""
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    assert ended.code == 128 + signum, ended
    assert "Traceback" not in ended.err
    words = f"stopped by {signum.name} behind step {load_checkpoint(checkpoint).state.step};"
    return ended.err.count("msmil: stopped by") == ended.err.count(words) == 1


def test_nothing_is_left_of_a_cluster_that_was_stopped() -> None:
    if reason := missing():
        pytest.skip(reason)
    hosts = Path("/etc/hosts").read_text()
    cluster = Cluster()
    try:
        job = cluster.submit("srun sleep 600", *SPREAD)
        wait_for(lambda: len(cluster.pids()) > 4, deadline_s=30)  # batch script, srun, two tasks
        assert job in cluster.call("squeue", "--noheader")
    finally:
        cluster.stop()
    wait_for(lambda: cluster.pids() == [], deadline_s=10)
    assert not cluster.folder.exists()
    assert Path("/etc/hosts").read_text() == hosts
    assert str(cluster.folder) not in os.environ.get("SLURM_CONF", "")


def test_tasks_see_each_other_and_a_mistake_of_the_user_is_one_line_of_each(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    config = write_tiny(tmp_path, packed)
    lines = [
        srun("doctor", "--collectives", "--json", module="launch.cli"),
        "echo $? >&2",
        srun(config, "train.epoch=1"),
    ]
    ended = cluster.wait(cluster.submit("\n".join(lines), *SPREAD), deadline_s=DEADLINE_S)
    said = json.loads(ended.out)
    assert said["state"] == "ok"
    assert said["checks"][0]["text"] == "2 ranks see each other: 1 on node1, 1 on node2"
    code, *words = [line for line in ended.err.splitlines() if not line.startswith("srun:")]
    assert (code, ended.code) == ("0", 2)
    assert words == [f"msmil: error: {config}: unknown key train.epoch. Fix: did you mean train.epochs?"] * 2


def test_stopped_killed_and_started_again_a_run_ends_like_one_of_two_ranks_without_slurm(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    """By a signal, by `scancel`, by SIGKILL of a task: each time the same srun goes on, on one node or on two."""
    longer = {"train": ON["train"] | {"epochs": 8, "accumulation": 1}, "evaluate": {"every_epochs": 8}}
    config, run = write_full(tmp_path, packed, "job", **longer), tmp_path / "runs" / "job"

    def start(*layout: str, options: tuple[str, ...] = ()) -> str:
        """A job whose script outlives `scancel`, so that it ends with what srun says; returns once steps are saved."""
        before = newest_step(run)
        job = cluster.submit(f"trap : TERM\n{srun(config, options=options)}\nexit $?", *layout)
        try:
            poll(lambda: newest_step(run) > before, deadline_s=DEADLINE_S)
        except AssertionError:
            pytest.fail(f"it saves nothing: {cluster.said(job)}")
        return job

    job = start(*SPREAD, options=(AT_ONCE,))
    cluster.signal(signal.SIGUSR1, job)  # to the steps of the job, as #SBATCH --signal=USR1@120 does
    assert stopped_once(cluster.wait(job, deadline_s=DEADLINE_S), signal.SIGUSR1, run)

    job = start(*TOGETHER)
    cluster.call("scancel", job)  # SIGTERM to every process of the job
    assert stopped_once(cluster.wait(job, deadline_s=DEADLINE_S), signal.SIGTERM, run)

    job = start(*TOGETHER, options=(AT_ONCE,))
    os.kill(cluster.tasks(job, "launch.train")[1], signal.SIGKILL)
    ended = cluster.wait(job, deadline_s=60)
    assert ended.code in (128 + signal.SIGKILL, 128 + signal.SIGTERM), ended
    assert "Traceback" not in ended.err

    job = start(*SPREAD)
    ended = cluster.wait(job, deadline_s=DEADLINE_S)
    assert ended.code == 0, ended.err
    assert "ranks: 2 on CPU" in (run / "environment.txt").read_text()

    world("launch.train", [str(config), "name=unbroken"], ranks=2, deadline_s=DEADLINE_S)
    found, unbroken = newest(run / "checkpoints"), newest(tmp_path / "runs" / "unbroken" / "checkpoints")
    assert found is not None
    assert unbroken is not None
    assert found.name == unbroken.name
    assert digests(found) == digests(unbroken)
    assert set(digests(found)) == {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}


def test_msmil_train_in_a_batch_script_stops_when_the_script_is_signalled(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    """Its ranks are not tasks of SLURM's: it hands the signal on."""
    endless = {"train": {"epochs": 5000}, "evaluate": {"every_epochs": 5000}}
    config, run = write_tiny(tmp_path, packed, name="job", **endless), tmp_path / "runs" / "job"
    program = shlex.join([sys.executable, "-m", "launch.cli", "train", str(config), "--ranks", "2"])
    job, log = cluster.submit(f"exec {program}", "--nodes=1"), run / "log.txt"
    wait_for(lambda: log.exists() and log.read_text().count("loss") > 0, deadline_s=DEADLINE_S)
    cluster.signal(signal.SIGUSR1, job, "--batch")  # as #SBATCH --signal=B:USR1@120 does
    assert stopped_once(cluster.wait(job, deadline_s=DEADLINE_S), signal.SIGUSR1, run)
    assert "ranks: 2 on CPU" in (run / "environment.txt").read_text()
