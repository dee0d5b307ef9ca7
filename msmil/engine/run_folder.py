"""A run's folder: it explains itself to somebody who finds it a year later."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from msmil.config import Config
from msmil.config_io import config_to_dict, dump_config, flatten, load_config
from msmil.engine.checkpoint import newest
from shards.errors import UserError
from shards.files import atomic_file

COMMAND_VARIABLE = "MSMIL_COMMAND"  # what the user typed, handed down to the ranks

# What a resumed run may change: the learning rate, how the same steps are computed, and what moves no weight.
# The data are held by their fingerprint, not by their path.
MAY_CHANGE: tuple[str, ...] = (
    "name", "output_dir", "data.shards", "data.workers", "data.prefetch_batches", "optim.lr",
    "train.engine", "train.zero_stage", "train.offload_optimizer", "train.accumulation", "train.gradient_checkpointing",
    "train.channels_last", "train.compile", "checkpoint.", "evaluate.", "tracking.",
)  # fmt: skip
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pandas", "pyarrow", "scikit-learn")


class RunFolder:
    """Paths of a run (DESIGN: files of a run)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.txt"
        self.log = self.root / "log.txt"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.predictions = self.root / "predictions"
        self.metrics = self.root / "metrics"
        self.figures = self.root / "figures"
        self._locked: int | None = None

    def check(self, config: Config) -> None:
        """Refuse a folder that cannot be written, or that holds a run of another configuration.

        Raises:
            UserError: with both values of each key that differs from the newest checkpoint's.
        """
        nearest = nearest_folder(self.root)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError("no run folder can be made here", file=nearest, fix="choose another output_dir")
        trained = newest(self.checkpoints)
        if trained is None:
            return  # a start that failed before its first checkpoint binds nobody
        before, now = (flatten(config_to_dict(c)) for c in (load_config(trained / "config.yaml"), config))
        differing = [
            f"{key} is {before.get(key)!r} there and {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            fix = "choose another name for the new run, or give the values of the old one to go on with it"
            raise UserError(f"holds a run of another configuration: {'; '.join(differing)}", file=self.root, fix=fix)

    def open(self, config: Config, *, world: int, device: str) -> None:
        """Make and lock the folder; write config.yaml and environment.txt (one entry per start).

        Raises:
            UserError: it cannot be written, or another process trains into it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            with atomic_file(self.config) as file:
                file.write(dump_config(config).encode("utf-8"))
            with self.environment.open("a", encoding="utf-8") as text:
                text.write(describe_environment(world, device))
        except OSError as error:
            fix = "free space or choose another output_dir"
            raise UserError(f"the run folder cannot be written ({error})", file=self.root, fix=fix) from None

    def _lock(self) -> None:
        """Two trainings of one name would delete each other's checkpoints. The kernel unlocks when we end."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = descriptor
        except BlockingIOError:
            os.close(descriptor)
            fix = "wait until it ends, or choose another name"
            raise UserError("another process trains into this folder", file=self.root, fix=fix) from None

    def close(self) -> None:
        """Unlock the folder."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None


def nearest_folder(path: Path) -> Path:
    """The deepest folder of a path that exists.

    Raises:
        UserError: something on the way is no folder, or may not be looked into.
    """
    fix = "choose another output_dir"
    try:
        while not path.exists():
            path = path.parent
    except OSError as error:
        raise UserError(f"cannot be looked into ({error.strerror})", file=path, fix=fix) from None
    if not path.is_dir():
        raise UserError("is no folder", file=path, fix=fix)
    return path


def describe_environment(world: int, device: str) -> str:
    """When, how and with what a run was started, as text."""
    lines = [f"started: {datetime.now().astimezone().isoformat(timespec='seconds')}"]
    own = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines.append(f"command: {os.environ.get(COMMAND_VARIABLE, own)}")
    lines.append(f"ranks: {world} on {device}")
    lines.append(f"commit: {_commit()}")
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines += [f"{name}: {importlib.metadata.version(name)}" for name in _PACKAGES]
    return "\n".join(lines) + "\n\n"


def _commit() -> str:
    """The commit of the code that runs, with a word where it was changed; 'no repository' outside one."""
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return "unknown (no git)"
    run = [
        subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    ]
    if run[0].returncode != 0:
        return "no repository"
    return run[0].stdout.strip() + (" with local changes" if run[1].stdout.strip() else "")
