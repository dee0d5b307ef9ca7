"""What ranks tell each other: that they meet, that sums are right, at what speed. Runs in every rank of a launcher.

R ranks, N numbers.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from msmil.engine.doctor.check import Check, broken, ok
from msmil.engine.doctor.meeting import Meeting, Missing, Place
from msmil.engine.environment import task_variables
from msmil.engine.runtime import gpu_in_use

MEGABYTE: Final = 10**6
SIZES: Final = tuple(MEGABYTE * 4**k for k in range(5))  # 1 MB to 256 MB
_NUMBERS: Final = 1 << 16
_REPEATS, _REPEAT_S = 5, 1.0
_STARTED: Final = "see that all ranks have the same MASTER_ADDR and MASTER_PORT, and look at the launcher's log"
_FAILED_S: Final = 10.0
_NETWORK: Final = (
    "see that ports between the machines are open, and choose the network by NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
)
_WRONG: Final = "numbers were changed on their way: look for a broken GPU or link (nvidia-smi, dmesg) on these machines"


def check_collectives(*, timeout_s: float) -> Iterator[tuple[Check, bool]]:
    """Lines about the ranks of this launcher, and whether this rank is the one to print them.

    Args:
        timeout_s: how long a rank is waited for, wherever it is needed.
    """
    # torch is about to give these collectives other names, which older versions do not know
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    os.environ.update(task_variables())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        text = "alone: no launcher has started others, so there is nobody to talk to"
        yield ok("ranks", f"{text} (torchrun --nproc_per_node 2 -m launch.cli doctor --collectives)"), True
        return
    try:
        meeting = Meeting(os.environ, timeout_s=timeout_s)
        device = _device()
        for check in _checks(meeting, device):
            yield check, meeting.rank == 0
    except Missing as missing:
        yield broken("ranks", str(missing), _STARTED), missing.speaker


def _device() -> torch.device:
    if not gpu_in_use():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _ranks(places: list[Place], device: torch.device) -> Check:
    """Who is there; two ranks on one GPU are refused by NCCL and slow elsewhere."""
    hosts = Counter(place.host for place in places)
    text = f"{len(places)} ranks see each other: " + ", ".join(f"{n} on {host}" for host, n in hosts.items())
    shared = [key for key, n in Counter((p.host, p.device) for p in places).items() if n > 1]
    if device.type == "cuda" and shared:
        host, name = shared[0]
        fix = "start as many ranks on a machine as it has GPUs, and give each its LOCAL_RANK"
        return broken("ranks", f"several ranks share {name} of {host}", fix)
    return ok("ranks", text)


def _checks(meeting: Meeting, device: torch.device) -> Iterator[Check]:
    yield _ranks(meeting.places(str(device)), device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # NCCL's own watchdog ends the process without a word of ours: it comes second
    timeout_s = meeting.timeout_s * (2 if backend == "nccl" else 1)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("msmil/group", meeting.store),  # type: ignore[attr-defined]
            rank=meeting.rank,
            world_size=meeting.world,
            timeout=timedelta(seconds=timeout_s),
        )
        yield from _sums(meeting, device)
        yield from _speeds(meeting, device)
    except RuntimeError as error:  # what a backend raises when it cannot connect, or a rank is silent
        yield _failure(meeting, backend, error)
        return
    dist.destroy_process_group()


def _failure(meeting: Meeting, backend: str, error: RuntimeError) -> Check:
    """Names the ranks that are silent, where some are: the others come here too."""
    text = str(error).strip().splitlines()[0]
    meeting.everybody("failed", timeout_s=_FAILED_S)
    return broken(backend, text, _NETWORK)


def _sums(meeting: Meeting, device: torch.device) -> Iterator[Check]:
    """Collectives of numbers that every rank can tell beforehand."""
    base_N = torch.arange(_NUMBERS, dtype=torch.float32, device=device) % 7 + 1
    own_N, world = base_N * (meeting.rank + 1), meeting.world
    total = world * (world + 1) // 2
    tests: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "all_reduce": lambda: (_in_place(dist.all_reduce, own_N.clone(), meeting), base_N * total),
        "broadcast": lambda: (_in_place(dist.broadcast, own_N.clone(), meeting, src=world - 1), base_N * world),
        "all_gather": lambda: (
            _into(dist.all_gather_into_tensor, own_N, _NUMBERS * world, meeting),
            torch.cat([base_N * (rank + 1) for rank in range(world)]),
        ),
        "reduce_scatter": lambda: (
            _into(dist.reduce_scatter_tensor, own_N.repeat(world), _NUMBERS, meeting),
            base_N * total,
        ),
    }
    right = []
    for name, test in tests.items():
        meeting.everybody(name)
        found, expected = test()
        wrong = int((found != expected).sum())
        bad = [rank for rank, told in enumerate(meeting.everybody(f"{name}/wrong", str(wrong))) if told != "0"]
        if bad:
            yield broken(name, f"wrong numbers on the ranks {', '.join(map(str, bad))}", _WRONG)
        else:
            right.append(name)
    if right:
        yield ok("sums", f"right: {', '.join(right)}")


def _in_place(collective: Any, tensor: Tensor, meeting: Meeting, **more: Any) -> Tensor:
    _finish(collective(tensor, async_op=True, **more), tensor.device, meeting)
    return tensor


def _into(collective: Any, tensor: Tensor, numbers: int, meeting: Meeting) -> Tensor:
    out = tensor.new_zeros(numbers)
    _finish(collective(out, tensor, async_op=True), tensor.device, meeting)
    return out


def _finish(work: Any, device: torch.device, meeting: Meeting) -> None:
    """Wait for a collective; raises RuntimeError where it takes longer than the timeout."""
    work.wait()  # gloo: until it is done; NCCL: only the GPU waits
    if device.type != "cuda":
        return
    done, deadline_s = torch.cuda.Event(), time.monotonic() + meeting.timeout_s
    done.record()
    while not done.query():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a collective is not done after {meeting.timeout_s:g} s")


def _speeds(meeting: Meeting, device: torch.device) -> Iterator[Check]:
    """All-reduces of several sizes. Bus bandwidth is what a ring sends over each link: 2 (R - 1) / R of the size."""
    factor = 2 * (meeting.world - 1) / meeting.world
    for size_bytes in SIZES:
        tensor = torch.ones(size_bytes // 4, device=device)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) <= _REPEATS and sum(seconds) < _REPEAT_S):
            meeting.everybody(f"speed/{size_bytes}/{len(seconds)}")
            start_s = time.perf_counter()
            _in_place(dist.all_reduce, tensor, meeting)
            seconds.append(time.perf_counter() - start_s)
            tensor.fill_(1.0)
            # all ranks repeat equally often
            seconds[-1] = max(map(float, meeting.everybody(f"took/{size_bytes}/{len(seconds)}", repr(seconds[-1]))))
        best_s = min(seconds[1:])
        rate = size_bytes / best_s
        text = f"{1e3 * best_s:.2f} ms: {rate / 1e9:.2f} GB/s, bus {factor * rate / 1e9:.2f} GB/s"
        yield ok(f"sum of {size_bytes // MEGABYTE} MB", text)
