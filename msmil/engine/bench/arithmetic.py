"""How much arithmetic a step is, and how fast this machine multiplies matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from msmil.engine.bench.clock import seconds

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LONGEST_S: Final = 0.02  # of one product on a CPU


def count_flops(action: Callable[[], object]) -> int:
    """Floating-point operations of what an action multiplies: convolutions and matrix products, forward and backward.

    A multiplication and an addition are two. What is done element by element is not counted.
    """
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter:
        action()
    return int(counter.get_total_flops())


def _backward(
    grad_out_shape: list[int],
    x_shape: list[int],
    w_shape: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: list[bool],
    **_: Any,
) -> int:
    """Each gradient that is asked for is as much as the forward: torch's own formula forgets groups, and counts a
    depthwise convolution as if it were a full one."""
    return conv_flop_count(x_shape, w_shape, grad_out_shape, transposed) * (output_mask[0] + output_mask[1])


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device, *, rounds: int = 5) -> float:
    """The most operations per second of square products, by the clock that steps are compared by (`Seconds.work`).

    Sizes double until a product takes long enough on a CPU, or up to 8192 on a GPU; the fastest counts.
    """
    best, side = 0.0, 512
    largest = 8192 if device.type == "cuda" else 2048
    while side <= largest:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        times = 10 if device.type == "cuda" else 1

        def multiply() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # as a step multiplies
                for _ in range(times):  # noqa: B023 - called at once
                    a @ b  # noqa: B023 - called at once

        multiply()
        shortest_s = min(seconds(multiply, device).work for _ in range(rounds))
        best = max(best, times * 2 * math.pow(side, 3) / shortest_s)
        if device.type == "cpu" and shortest_s > _LONGEST_S:
            break
        side *= 2
    return best
