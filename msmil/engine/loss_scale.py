"""fp16's loss scaling for an engine that has none of its own over fp32 weights.

Gradients of fp16 maps underflow; so the loss is multiplied by a large number, and the gradients are divided by it. A
step in which that overflows is skipped, and the number halved. The rule and the form of the state are those of
torch.amp.GradScaler, so that a checkpoint fits either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# GradScaler's own
_INITIAL: Final = {
    "scale": 2.0**16,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


class LossScale:
    """A number that the loss is multiplied with; the same on all ranks, since all see the same overflows.

    Args:
        state: to go on with, as `state_dict` gave it here or GradScaler's did.
    """

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self._state = dict(_INITIAL if state is None else state)
        assert self._state.keys() == _INITIAL.keys(), f"no state of a loss scale: {sorted(self._state)}"

    @property
    def value(self) -> float:
        """What the loss of the coming step is multiplied with."""
        return float(self._state["scale"])

    def update(self, *, overflowed: bool) -> None:
        """Shrink after a step that overflowed; grow after many that did not."""
        state = self._state
        if overflowed:
            state["scale"] *= state["backoff_factor"]
            state["_growth_tracker"] = 0
            return
        state["_growth_tracker"] += 1
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return dict(self._state)
