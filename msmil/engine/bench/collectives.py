"""Which collectives a piece of code calls, whatever engine calls them, and how long they take alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msmil.engine.bench.projection import Kind, Traffic
from msmil.engine.runtime import Runtime

# operators of torch.distributed, by what they do; barriers and object gathers are made of these
_KINDS: Final[dict[str, Kind]] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
}
_SILENT: Final = ("barrier", "monitored_barrier_")


@dataclass(frozen=True, order=True)
class Call:
    """A collective: payload_bytes is the size of the whole tensor (all ranks' parts of a gather or scatter)."""

    kind: Kind
    payload_bytes: int


class _Counting(TorchDispatchMode):
    def __init__(self, calls: Counter[Call], world: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._world = calls, world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name not in _SILENT:
            if name not in _KINDS:
                raise NotImplementedError(f"{func._schema.name} is a collective that is not counted")
            self._calls[Call(_KINDS[name], self._payload_bytes(name, args))] += 1
        return func(*args, **(kwargs or {}))

    def _payload_bytes(self, name: str, args: Any) -> int:
        """The input of a reduce-scatter and the output of a gather hold all ranks' parts; others have one tensor."""
        whole = args[1] if _KINDS[name] == "reduce_scatter" else args[0]
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(whole))


@contextmanager
def counted(world: int) -> Iterator[Counter[Call]]:
    """Count the collectives that are called in this block; compiled code runs uncompiled in it."""
    calls: Counter[Call] = Counter()
    with torch.compiler.set_stance("force_eager"), _Counting(calls, world):
        yield calls


def as_traffic(calls: Mapping[Call, int]) -> tuple[Traffic, ...]:
    """Calls, summed by kind."""
    return tuple(
        Traffic(
            kind=kind,
            payload_bytes=sum(call.payload_bytes * times for call, times in calls.items() if call.kind == kind),
            calls=sum(times for call, times in calls.items() if call.kind == kind),
        )
        for kind in dict.fromkeys(call.kind for call in sorted(calls))
    )


def seconds_alone(calls: Mapping[Call, int], runtime: Runtime, *, repeats: int = 3) -> float:
    """Seconds of the same collectives, one after another and with nothing beside them; the best of some repeats.

    All ranks have to call it with the same calls.
    """
    if runtime.world == 1:
        return 0.0
    largest = max((call.payload_bytes for call in calls), default=0)
    one = torch.ones(-(-largest // 4) + runtime.world, device=runtime.device)
    other = torch.empty_like(one)
    best_s = float("inf")
    for _ in range(repeats + 1):
        runtime.barrier()
        start_s = time.perf_counter()
        for call, times in sorted(calls.items()):
            for _ in range(times):
                replay(call, one, other, runtime.world)
        runtime.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def replay(call: Call, one: Tensor, other: Tensor, world: int) -> None:
    """Do a collective of this kind and size on buffers that are large enough (float32, flat)."""
    share = max(1, -(-call.payload_bytes // 4 // world))
    if call.kind == "all_reduce":
        dist.all_reduce(one[: max(1, call.payload_bytes // 4)])
    elif call.kind == "broadcast":
        dist.broadcast(one[: max(1, call.payload_bytes // 4)], src=0)
    elif call.kind == "all_gather":
        dist.all_gather_into_tensor(other[: share * world], one[:share])
    else:
        dist.reduce_scatter_tensor(other[:share], one[: share * world])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
