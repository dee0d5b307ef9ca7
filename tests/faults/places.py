"""Where a rank is, in a file that outlives its death by SIGKILL: "step 12, backward"."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msmil.engine.train as training
from msmil.engine.ddp import DdpEngine
from msmil.engine.step import Stepper
from msmil.engine.zero import ZeroEngine

_WIDTH = 40


def mark_places(file: Path) -> None:
    """Let this process write down what it enters; done in a forked rank, before it trains."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    place = "start"

    def write(text: str) -> str:
        nonlocal place
        before, place = place, text
        os.pwrite(descriptor, text.ljust(_WIDTH).encode(), 0)
        return before

    def inside(owner: Any, name: str, what: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            before = place
            if before != "start":
                write(f"{before.partition(',')[0]}, {what}")
            try:
                return function(*arguments, **more)
            finally:
                write(before)

        setattr(owner, name, wrapped)

    def step(self: Stepper, *arguments: Any, **more: Any) -> Any:
        write(f"step {more['step'] + 1}")
        return call(self, *arguments, **more)

    write(place)
    call = Stepper.__call__
    Stepper.__call__ = step  # type: ignore[method-assign]
    for engine in (DdpEngine, ZeroEngine):
        for name, what in (("__call__", "forward"), ("backward", "backward"), ("update", "update")):
            inside(engine, name, what)
    for name, what in (("save", "save"), ("validate", "validation")):
        inside(training, name, what)


def read_place(file: Path) -> str:
    """Where a rank is, or was when it died."""
    return file.read_text(encoding="utf-8").strip() if file.exists() else "start"


def step_of(place: str) -> int:
    """The step that a rank is in, 1-based; 0 before the first of this start."""
    digits = place.partition(",")[0].removeprefix("step ")
    return int(digits) if digits.isdigit() else 0
