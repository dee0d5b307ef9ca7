"""Commands that start ranks run one rank in this process instead: the same program, without a launcher."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

STARTERS = ("launch.train", "launch.evaluate", "launch.extract", "launch.bench_scaling")


@contextmanager
def one_rank_in_this_process() -> Iterator[None]:
    """Replace the launcher of every command that has one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        patches = [mock.patch(f"{name}.start_ranks", alone) for name in STARTERS]
        try:
            for patch in patches:
                patch.start()
            yield
        finally:
            for patch in patches:
                patch.stop()
            _forget_world()
            torch.set_num_threads(threads)


def alone(module: str, arguments: Sequence[str], **_: Any) -> int:
    """What `start_ranks` does, with one rank, here."""
    _forget_world()
    code: int = importlib.import_module(module).rank_main(list(arguments))
    return code


def _forget_world() -> None:
    """accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states: tuple[Any, ...] = (AcceleratorState, PartialState, GradientState)
    for state in states:
        state._shared_state.clear()


def main() -> int:
    """`python -c "..." '["msmil pack ...", ...]'`: run command lines with the sources of the working folder."""
    import msmil
    from launch.cli import main as msmil_main

    assert Path(msmil.__file__).is_relative_to(Path.cwd()), f"{msmil.__file__} is not that of {Path.cwd()}"
    with one_rank_in_this_process():
        for line in json.loads(sys.argv[1]):
            name, *arguments = shlex.split(line)
            assert name == "msmil", line
            code = msmil_main(arguments)
            if code != 0:
                print(f"{line}: exit code {code}", file=sys.stderr)
                return code
    return 0
