"""What a step sends over the links on any number of GPUs, and what that leaves of the speed. Arithmetic alone.

Payload is the size of the tensor that a collective is called on; sent is what one rank puts on its link for it, by
the ring algorithm (Patarasuk and Yuan, 2009): it is as much as the rank receives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast"]
Engine = Literal["ddp", "zero0", "zero1", "zero2", "zero3"]
ENGINES: Final[tuple[Engine, ...]] = ("ddp", "zero0", "zero1", "zero2", "zero3")

# rounds of a ring in units of n - 1 messages of payload / n
_ROUNDS: Final[dict[Kind, int]] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "broadcast": 1}
_DDP_FIRST_BUCKET_BYTES: Final = 2**20
_DDP_BUCKET_BYTES: Final = 25 * 2**20


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What engines send of a network; bytes are those of fp32 numbers.

    trained_bytes: of the parameters that train, and so of their gradients.
    divided_bytes: of those that ZeRO-3 divides among the ranks, trained or not.
    whole_bytes, whole_tensors: of those that it keeps whole on each, since they are small, and how many there are.
    groups: of the optimizer; DeepSpeed treats each by itself.
    """

    trained_bytes: int
    divided_bytes: int
    whole_bytes: int
    whole_tensors: int
    groups: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind in an optimizer step: payload of all of them together, and how many there are."""

    kind: Kind
    payload_bytes: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Links:
    """What connects the GPUs.

    gpu_bytes_per_s: what one GPU sends to another one of its machine.
    node_bytes_per_s: what all GPUs of a machine together send to the next machine.
    latency_s: of one message.
    """

    name: str
    gpu_bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float = 5e-6


# nominal rates of one direction, less a fifth: give measured ones where you have them
LINKS: Final = (
    Links(name="NVLink, 8 x 400 Gb/s", gpu_bytes_per_s=240e9, node_bytes_per_s=320e9),
    Links(name="NVLink, 1 x 100 Gb/s", gpu_bytes_per_s=240e9, node_bytes_per_s=10e9),
    Links(name="PCIe 4, 1 x 25 Gb/s", gpu_bytes_per_s=20e9, node_bytes_per_s=2.5e9),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one rank without communication.

    images: of this rank.
    seconds: all of it.
    backward_s: of it, the last micro-step's backward, behind which DDP hides its all-reduce.
    """

    images: int
    seconds: float
    backward_s: float


@dataclass(frozen=True, kw_only=True)
class Projection:
    """What is expected of some ranks: bytes that each sends in a step, seconds of that, seconds not hidden."""

    ranks: int
    sent_bytes: float
    communication_s: float
    exposed_s: float
    images_per_s: float
    efficiency: float


def sent_bytes(kind: Kind, payload_bytes: float, ranks: int) -> float:
    """What one rank sends for a collective by a ring: (n-1)/n of the payload, twice for an all-reduce."""
    return _ROUNDS[kind] * payload_bytes * (ranks - 1) / ranks


def traffic(engine: Engine, parameters: Parameters, accumulation: int) -> tuple[Traffic, ...]:
    """The collectives of an optimizer step of `accumulation` micro-steps, as our engines do them.

    They were counted in real steps (tests/distributed/test_volumes.py):

    - DDP and ZeRO-0 sum the gradients once, behind the last micro-step.
    - ZeRO-1 does too, and gathers the updated weights; ZeRO-2 sums in every micro-step. DeepSpeed sums by an all-reduce
      where parts of a bucket belong to several ranks, as they do here: both send half as much again as DDP.
    - ZeRO-3 gathers the divided weights in every micro-step, once: up to 1e9 numbers stay until the backward needs
      them, and up to 5e7 come in one call. It scatters the sums in every micro-step, and behind the update gathers each
      small tensor by itself.

    Beside them there are single numbers (losses, norms), which cost their latency alone.
    """
    gradients, m = parameters.trained_bytes, accumulation
    numbers = Traffic(
        kind="all_reduce", payload_bytes=0, calls=1 if engine in ("ddp", "zero0") else 1 + parameters.groups
    )
    if engine in ("ddp", "zero0"):
        calls = ddp_buckets(gradients) if engine == "ddp" else 1
        return (Traffic(kind="all_reduce", payload_bytes=gradients, calls=calls), numbers)
    if engine in ("zero1", "zero2"):
        sums = m if engine == "zero2" else 1
        return (
            Traffic(kind="all_reduce", payload_bytes=sums * gradients, calls=sums),
            Traffic(kind="all_gather", payload_bytes=gradients, calls=parameters.groups),
            numbers,
        )
    return (
        Traffic(kind="reduce_scatter", payload_bytes=m * gradients, calls=m),
        Traffic(
            kind="all_gather", payload_bytes=m * parameters.divided_bytes, calls=m if parameters.divided_bytes else 0
        ),
        Traffic(kind="all_gather", payload_bytes=parameters.whole_bytes, calls=parameters.whole_tensors),
        numbers,
    )


def ddp_buckets(gradient_bytes: int) -> int:
    """Into how many all-reduces DDP cuts the gradients: one of 1 MiB, then 25 MiB each."""
    return 1 + max(0, math.ceil((gradient_bytes - _DDP_FIRST_BUCKET_BYTES) / _DDP_BUCKET_BYTES))


def ring_rate(links: Links, ranks: int, gpus_per_node: int) -> float:
    """Bytes per second that each rank of a ring sends.

    On one machine, its link. On several, all that a GPU sends passes the border of each machine once, whatever
    network cards share it: the slower one of the link and the machine's network counts.
    """
    if ranks <= gpus_per_node:
        return links.gpu_bytes_per_s
    return min(links.gpu_bytes_per_s, links.node_bytes_per_s)


def ring_seconds(part: Traffic, links: Links, ranks: int, gpus_per_node: int) -> float:
    """Seconds of these collectives alone: bytes over the rate, and the latency of every message in a row.

    Trees need fewer messages, so that this is an upper bound on many machines.
    """
    messages = part.calls * _ROUNDS[part.kind] * (ranks - 1)
    rate = ring_rate(links, ranks, gpus_per_node)
    return sent_bytes(part.kind, part.payload_bytes, ranks) / rate + messages * links.latency_s


def project(
    engine: Engine,
    parameters: Parameters,
    step: Step,
    links: Links,
    *,
    ranks: int,
    gpus_per_node: int,
    accumulation: int,
    overlap: bool,
) -> Projection:
    """What is expected of `ranks` GPUs, each with the batch of `step`.

    Args:
        engine: says which collectives.
        parameters: of the network.
        step: measured on one rank.
        links: what connects them.
        ranks: GPUs in all.
        gpus_per_node: GPUs of a machine.
        accumulation: micro-steps of a step.
        overlap: DDP sums a bucket while the backward goes on: all but the last bucket hides behind it, up to the
            backward's length. The other engines, as they are configured here, hide nothing.
    """
    parts = traffic(engine, parameters, accumulation)
    first_s, *others_s = [ring_seconds(part, links, ranks, gpus_per_node) for part in parts]
    seconds = first_s + sum(others_s)
    exposed = seconds
    if overlap and engine == "ddp":
        exposed = max(first_s / parts[0].calls, first_s - step.backward_s) + sum(others_s)
    total = step.seconds + exposed
    return Projection(
        ranks=ranks,
        sent_bytes=sum(sent_bytes(part.kind, part.payload_bytes, ranks) for part in parts),
        communication_s=seconds,
        exposed_s=exposed,
        images_per_s=ranks * step.images / total,
        efficiency=step.seconds / total,
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What images cost before they are on the device: stored bytes of one, seconds of one core to decode it."""

    image_bytes: float
    decode_s: float


def cores_needed(reading: Reading, images_per_s: float) -> float:
    """Cores that decode as fast as images are used."""
    return images_per_s * reading.decode_s


def read_bytes_per_s(reading: Reading, images_per_s: float) -> float:
    """What the file system must give."""
    return images_per_s * reading.image_bytes


def most_ranks(available: float, needed_by_one: float) -> int:
    """How many ranks something shared serves, such as a file system's bytes per second."""
    return math.floor(available / needed_by_one)


def worlds(largest: int) -> Sequence[int]:
    """1, 2, 4, ... and the largest itself."""
    return sorted({*(2**k for k in range(largest.bit_length())), largest})
