"""A real SLURM of two nodes on this machine: its own keys, ports and folder, and nothing left when it stops.

The daemons and all that their jobs start live in a PID namespace, whose end is theirs, and in a mount namespace, where
/etc/hosts knows the nodes.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.worlds import ROOT, environment, wait_for

NODES = ("node1", "node2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "unshare", "setpriv")
_START_S, _ANSWER_S = 30.0, 20.0
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_NAMESPACES = ("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child")
_CONFIGURATION = """\
ClusterName=msmil
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
# a task answers srun at the address that srun called from: on one machine all have the same
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
FirstJobId={first_job}
MinJobAge=3600
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN"


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        packages = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        return f"needs SLURM, {', '.join(absent)} not found (Debian: {packages})"
    if os.geteuid() != 0:
        return "needs root: each node of the cluster has a host name of its own"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Ended:
    """How a job ended, and what its script and its steps printed."""

    code: int
    out: str
    err: str


class Cluster:
    """Starts when it is made; `stop` ends it and all that runs on it."""

    def __init__(self) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="msmil_slurm_"))  # short, for the sake of munge's socket
        self._jobs: list[str] = []
        _write_configuration(folder)
        with (folder / "daemons.txt").open("wb") as log:
            self._daemons = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, "bash", str(folder / "daemons.sh")],
                env={"PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(self._ready, deadline_s=_START_S)
        except BaseException:
            print((folder / "daemons.txt").read_text(errors="replace"))
            self.stop()
            raise

    def end_jobs(self) -> None:
        """Kill what still runs, of a test that failed."""
        for job in self._jobs:
            if self._ended(job) is None:
                self.call("scancel", "--signal=KILL", "--full", job)

    def stop(self) -> None:
        """End every process and remove the folder."""
        self._daemons.kill()  # unshare: the first process of its namespace dies with it, and all others with that
        self._daemons.wait()
        shutil.rmtree(self.folder)

    def submit(self, script: str, *options: str) -> str:
        """Queue a batch script, which starts in the repository; gives the job's number."""
        number = len(self._jobs)
        file = self.folder / f"job_{number}.sh"
        file.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        logs = [f"--output={self._log(number, 'out')}", f"--error={self._log(number, 'err')}"]
        job = self.call("sbatch", "--parsable", f"--chdir={ROOT}", *logs, *options, str(file)).strip()
        self._jobs.append(job)
        return job

    def said(self, job: str) -> tuple[str, str]:
        """What a job has printed so far, to stdout and to stderr."""
        number = self._jobs.index(job)
        files = [self._log(number, stream) for stream in ("out", "err")]
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
        return out, err

    def wait(self, job: str, *, deadline_s: float) -> Ended:
        """Wait until a job has ended; one that does not is killed, and fails the test."""
        end_s = time.monotonic() + deadline_s
        while (found := self._ended(job)) is None:
            if time.monotonic() > end_s:
                self.call("scancel", "--signal=KILL", "--full", job)
                raise AssertionError(f"job {job} hung for {deadline_s} s: {self.said(job)}")
            time.sleep(0.1)
        return Ended(found, *self.said(job))

    def signal(self, signum: signal.Signals, target: str, *options: str) -> None:
        """Send a signal to a job, or to a step of it ("7.0"), by scancel."""
        self.call("scancel", f"--signal={signum.name.removeprefix('SIG')}", *options, target)

    def call(self, *command: str) -> str:
        """Run one of SLURM's programs; gives what it printed."""
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout

    def tasks(self, job: str, module: str) -> list[int]:
        """Pids of the tasks of a job that run a module, in the order of their ranks."""
        found = {}
        for pid in self.pids():
            words, said = _words(pid, "cmdline"), _words(pid, "environ")
            if module in words and f"SLURM_JOB_ID={job}" in said:
                (rank,) = [word.removeprefix("SLURM_PROCID=") for word in said if word.startswith("SLURM_PROCID=")]
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def pids(self) -> list[int]:
        """Processes of this cluster: daemons and what its jobs have started."""
        everything = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
        ours = f"SLURM_CONF={self._file}"
        return [p for p in everything if ours in _words(p, "environ") or self._file in _words(p, "cmdline")]

    @property
    def _file(self) -> str:
        return str(self.folder / "slurm.conf")

    def _environment(self) -> dict[str, str]:
        outside = {key: value for key, value in environment().items() if not key.startswith(("SLURM", "SBATCH"))}
        return outside | {"PATH": _PATH, "SLURM_CONF": self._file}

    def _log(self, number: int, stream: str) -> Path:
        return self.folder / f"job_{number}.{stream}"

    def _ready(self) -> bool:
        assert self._daemons.poll() is None, "the daemons of SLURM have ended"
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        try:
            done = subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, timeout=3, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.stdout.split() == list(NODES)

    def _ended(self, job: str) -> int | None:
        """The exit code of a job as shells say it (128 + signal); None while it has not ended."""
        said = self.call("scontrol", "show", "job", "--oneliner", job)
        if re.search(r" JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING) ", said):
            return None
        found = re.search(r" ExitCode=(\d+):(\d+) ", said)
        assert found is not None, said
        code, signum = map(int, found.groups())
        return 128 + signum if signum else code


def _words(pid: int, what: str) -> list[str]:
    """The command line or the environment of a process; nothing when it has just ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _write_configuration(folder: Path) -> None:
    """All that the daemons read: configuration, key, hosts, and the script that starts them."""
    (folder / "state").mkdir()
    ports, host = _free_ports(1 + len(NODES)), socket.gethostname().partition(".")[0]
    nodes = [_NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
    # ranks meet on a port that follows from the job: two clusters on one machine should not count alike
    first_job = secrets.randbelow(1_000_000) + 1
    text = _CONFIGURATION.format(folder=folder, host=host, ports=ports, first_job=first_job, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n", encoding="utf-8")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    (folder / "daemons.sh").write_text(_start_script(folder), encoding="utf-8")


def _start_script(folder: Path) -> str:
    """Runs as the first process of the namespaces; ends when a daemon does."""
    at, conf = shlex.quote(str(folder)), shlex.quote(str(folder / "slurm.conf"))
    munged = (
        f"munged --foreground --force --key-file={at}/munge.key --socket={at}/munge.socket "
        f"--pid-file={at}/munged.pid --log-file={at}/munged.log --seed-file={at}/munged.seed &"
    )
    lines = [f"mount --bind {at}/hosts /etc/hosts || exit", munged]
    lines += [f"until [ -S {at}/munge.socket ]; do sleep 0.02; done", f"slurmctld -D -f {conf} &"]
    for name in NODES:
        lines += [f"mkdir {at}/spool_{name}"]
        lines += [f'unshare --uts sh -c \'hostname {name}; exec "$0" "$@"\' slurmd -D -N {name} -f {conf} &']
    return "\n".join([*lines, "wait -n", ""])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
