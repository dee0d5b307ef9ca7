"""Seconds and bytes of an action on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from msmil.engine.memory import peak_bytes, reset_peak


class Seconds(NamedTuple):
    """wall: by the clock on the wall. work: what is compared: on a CPU this process's processor time, in which what
    else runs on the machine does not count; on a GPU the same as wall."""

    wall: float
    work: float


def seconds(action: Callable[[], object], device: torch.device) -> Seconds:
    """How long an action takes, the device's work included."""
    _wait(device)
    wall_s, work_s = time.perf_counter(), time.process_time()
    action()
    _wait(device)
    wall_s, work_s = time.perf_counter() - wall_s, time.process_time() - work_s
    return Seconds(wall_s, work_s if device.type == "cpu" else wall_s)


def in_turn(actions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Seconds]:
    """Medians over rounds in which every action is done once, so that what else runs here meets them alike."""
    found: dict[str, list[Seconds]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(seconds(action, device))
    return {name: Seconds(*map(median, zip(*times, strict=True))) for name, times in found.items()}


def peak_of(action: Callable[[], object], device: torch.device) -> int:
    """The most memory in use while an action runs, with what was in use before: of a GPU, or of this process."""
    reset_peak(device)
    action()
    return peak_bytes(device)


def clock_name(device: torch.device) -> str:
    """What `work` is, in words."""
    return "processor time" if device.type == "cpu" else "wall time"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
