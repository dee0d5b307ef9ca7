"""A run's folder: it explains itself to somebody who finds it a year later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from msmil.config import Config
from msmil.config_io import config_to_dict, dump_config, flatten, load_config
from shards.errors import UserError

# What a resumed run may change: nothing that moves a weight. The data are held by their fingerprint, not by their path.
MAY_CHANGE: tuple[str, ...] = (
    "name",
    "output_dir",
    "data.shards",
    "data.workers",
    "data.prefetch_batches",
    "checkpoint.",
    "evaluate.",
)
MAY_CHANGE += ("tracking.",)
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

    def check(self, config: Config) -> None:
        """Refuse a folder that cannot be written, or that holds a run of another configuration.

        Raises:
            UserError: with both values of each key that differs.
        """
        nearest = self.root
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError("no run folder can be made here", file=nearest, fix="choose another output_dir")
        if not self.config.exists():
            return
        before, now = (flatten(config_to_dict(c)) for c in (load_config(self.config), config))
        differing = [
            f"{key} is {before.get(key)!r} there and {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            fix = "choose another name for the new run, or give the values of the old one to go on with it"
            raise UserError(f"holds a run of another configuration: {'; '.join(differing)}", file=self.root, fix=fix)

    def open(self, config: Config) -> None:
        """Make the folder and write config.yaml and environment.txt (one entry per start)."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = self.config.with_suffix(".tmp")
            temporary.write_text(dump_config(config), encoding="utf-8")
            temporary.rename(self.config)
            with self.environment.open("a", encoding="utf-8") as file:
                file.write(describe_environment())
        except OSError as error:
            fix = "free space or choose another output_dir"
            raise UserError(f"the run folder cannot be written ({error})", file=self.root, fix=fix) from None


def describe_environment() -> str:
    """When, how and with what a run was started, as text."""
    lines = [f"started: {datetime.now().astimezone().isoformat(timespec='seconds')}"]
    lines.append(f"command: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
    lines.append(f"commit: {_commit()}")
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines += [f"{name}: {importlib.metadata.version(name)}" for name in _PACKAGES]
    return "\n".join(lines) + "\n\n"


def _commit() -> str:
    """The commit of the code that runs, with a word where it was changed; 'no repository' outside one."""
    here = Path(__file__).parent
    run = [
        subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    ]
    if run[0].returncode != 0:
        return "no repository"
    return run[0].stdout.strip() + (" with local changes" if run[1].stdout.strip() else "")
