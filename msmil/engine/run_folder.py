"""A run's folder: it explains itself to somebody who finds it a year later."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from msmil.config import Config
from msmil.config_io import config_to_dict, dump_config, flatten, load_config
from msmil.engine.checkpoint_state import changed, checkpoints, cut_off, none_is_whole
from msmil.evaluation.predictions import write_atomically
from shards.errors import UserError
from shards.files import put_back_folders
from shards.types import Split

_LOCK_WAIT_S = 1.0  # `msmil runs` looks at a lock for an instant
COMMAND_VARIABLE = "MSMIL_COMMAND"  # what the user typed, handed down to the ranks

# Options that move no weight. The data are held by their fingerprint, not by their path.
MOVES_NOTHING: tuple[str, ...] = (
    "name", "output_dir", "data.shards", "data.workers", "data.prefetch_batches",
    "data.cache_", "data.request_", "train.timeout_s", "checkpoint.", "evaluate.", "tracking.",
)  # fmt: skip
# What a resumed run may change: those, the learning rate, and how the same steps are computed.
MAY_CHANGE: tuple[str, ...] = (
    *MOVES_NOTHING, "data.on_error", "data.max_skipped_fraction", "optim.lr", "train.engine", "train.zero_stage",
    "train.offload_optimizer", "train.accumulation", "train.gradient_checkpointing", "train.channels_last",
    "train.compile",
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
        self._lock_file = self.root / ".lock"
        self.gallery = self.root / "gallery"
        self.data = self.root / "data.json"
        self._locked: int | None = None

    def check(self, config: Config) -> None:
        """Refuse a folder that cannot be written, or that holds a run of another configuration.

        Raises:
            UserError: with both values of each key that differs from the newest checkpoint's (or, where steps were
                recorded but none was saved, from config.yaml's); none of several checkpoints is whole.
        """
        nearest = nearest_folder(self.root)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError("no run folder can be made here", file=nearest, fix="choose another output_dir")
        self.mend()
        trained = self._newest()
        if trained is None and not (self.config.exists() and _has_steps(self.tensorboard)):
            return  # a start that failed before it trained binds nobody
        before, now = (
            flatten(config_to_dict(c)) for c in (load_config((trained or self.root) / "config.yaml"), config)
        )
        differing = [
            f"{key} is {before.get(key)!r} there and {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            fix = "choose another name for the new run, or give the values of the old one to go on with it"
            if trained is None:
                fix = "choose another name for the new run"
                fix += "" if self.in_training() else ", or remove this folder: it has no checkpoint to go on from"
            raise UserError(f"holds a run of another configuration: {'; '.join(differing)}", file=self.root, fix=fix)

    def _newest(self) -> Path | None:
        """The newest whole checkpoint whose configuration can be trusted; a start goes on from it or one before it.

        Raises:
            UserError: none of several is so.
        """
        reason = ""
        for folder in reversed(checkpoints(self.checkpoints)):
            broken = cut_off(folder) or changed(folder, self.config.name)
            if not broken:
                return folder
            reason = reason or f"{folder.name}: {broken}"
        if reason:
            raise none_is_whole(self.checkpoints, reason)
        return None

    def mend(self) -> None:
        """Give a checkpoint its name again that a training was saving anew when it was killed."""
        with contextlib.suppress(OSError):  # not ours: who reads it says why
            if not self.in_training():
                put_back_folders(self.checkpoints)

    def open(self, *, world: int, device: str) -> None:
        """Make and lock the folder; add what is started to environment.txt.

        Raises:
            UserError: it cannot be written, or another process trains into it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            with self.environment.open("a", encoding="utf-8") as text:
                text.write(describe_environment(world, device))
        except OSError as error:
            fix = "free space or choose another output_dir"
            raise UserError(f"the run folder cannot be written ({error})", file=self.root, fix=fix) from None

    def write_config(self, config: Config) -> None:
        """Write config.yaml: what the run is trained with from now on.

        Raises UserError where it cannot be written.
        """
        write_atomically(self.config, dump_config(config).encode("utf-8"))

    def describe(self, data: Mapping[str, Any]) -> None:
        """Write data.json: what the run is trained on (`describe_data`).

        Raises UserError where it cannot be written.
        """
        write_atomically(self.data, json.dumps(data, indent=2).encode("utf-8"))

    def _lock(self) -> None:
        """Two trainings of one name would delete each other's checkpoints. The kernel unlocks when we end."""
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        end_s = time.monotonic() + _LOCK_WAIT_S
        while not _flock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > end_s:
                os.close(descriptor)
                fix = "wait until it ends, or choose another name"
                raise UserError("another process trains into this folder", file=self.root, fix=fix)
            time.sleep(_LOCK_WAIT_S / 20)
        self._locked = descriptor

    def in_training(self) -> bool:
        """Whether a process trains into this folder now.

        It is asked with a shared lock that is given back at once: a training that starts in that moment waits for it.
        On a network file system that keeps no locks, a training on another machine goes unseen.

        Raises:
            OSError: the lock file may not be read.
        """
        try:
            descriptor = os.open(self._lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _flock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unlock the folder."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None


def _flock(descriptor: int, kind: int) -> bool:
    """Lock without waiting; False where another process holds it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_steps(tensorboard: Path) -> bool:
    """Whether TensorBoard shows a step that was trained. A start writes its configuration at step 0 before any."""
    files = list(tensorboard.glob("*tfevents*"))
    if not files:
        return False
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # a second

    events = (event for file in files for event in EventFileLoader(str(file)).Load())
    return any(event.step > 0 and event.HasField("summary") for event in events)


def read_results(folder: RunFolder, split: Split) -> dict[str, Any]:
    """The content of metrics/<split>.json.

    Raises:
        UserError: it is missing or no JSON.
    """
    file = folder.metrics / f"{split}.json"
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", file=file, fix="remove it and evaluate the run again") from None
    return results


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
