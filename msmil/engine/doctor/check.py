"""One line of `msmil doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

State = Literal["ok", "warning", "broken"]
STATES: Final[tuple[State, ...]] = ("ok", "warning", "broken")  # from best to worst


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, what was found, and what to do about it where it is not ok."""

    name: str
    state: State
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.fix), f"{self.name} is {self.state} and its fix is {self.fix!r}"


def ok(name: str, text: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", text)


def warning(name: str, text: str, fix: str) -> Check:
    """Works, but not as well as it could, or not for everything."""
    return Check(name, "warning", text, fix)


def broken(name: str, text: str, fix: str) -> Check:
    """Training would fail."""
    return Check(name, "broken", text, fix)


def worst(checks: Iterable[Check]) -> State:
    """The worst state of all."""
    return max((check.state for check in checks), key=STATES.index, default="ok")
