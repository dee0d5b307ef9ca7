"""bf16 on CPUs that have no instructions for it.

torch's own kernels then take 10 times as long as fp32 (`msmil bench train --modes each` beside this module: as long as
fp32). What the instructions do is defined, and quick without them: factors are bf16 numbers, products and sums are
fp32, the result is rounded to bf16.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library

# Those of autocast's list that networks here are made of; einsum and attention call them.
_OPERATORS: Final = (
    "conv2d",
    "conv2d.padding",
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "scaled_dot_product_attention",
)

_registered: Final = ExitStack()


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16; without them torch converts each number, in its slow kernels."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def compute_bf16(*, natively: bool | None = None) -> None:
    """How torch.autocast("cpu", torch.bfloat16) computes in this process from now on, forward and backward.

    Args:
        natively: by torch's own kernels, or as above; by default as above where the CPU has no instructions for it.
    """
    _registered.close()
    if not (cpu_has_bf16() if natively is None else natively):
        _register(_registered.enter_context(torch.library._scoped_library("aten", "IMPL")))


def _register(library: Library) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name in _OPERATORS:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, functools.partial(_rounded_call, operator), "AutocastCPU")


def _rounded_call(operator: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        if dtype != torch.bfloat16:
            return operator(*(_as(dtype, value) for value in args), **kwargs)
        result = operator(*(_as(torch.float32, _as(dtype, value)) for value in args), **kwargs)
        rounded: Tensor = _as(dtype, result)
        return rounded


def _as(dtype: torch.dtype, value: Any) -> Any:
    """A tensor as another type; what autocast leaves alone (whole numbers, float64) is left alone."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value
