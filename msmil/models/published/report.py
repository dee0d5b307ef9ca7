"""What became of a published file: nothing is dropped without a name.

A key is a name in a state dict; ours are those of msmil's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shards.errors import UserError

Shape = tuple[int, ...]
_NAMED = 4  # keys in an error message


@dataclass
class Report:
    """The account of a conversion.

    loaded: {our key: (published key, shape)}; converted: {our key: what was changed}, a part of loaded;
    unused: {published key: (shape, why)}; missing, unexpected: {key: what is wrong}, empty where it succeeded;
    inferred: words of the model section that keys and shapes tell; assumed: those taken from published defaults.
    """

    source: str
    loaded: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    unused: dict[str, tuple[Shape, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    inferred: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)

    def check(self, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Hold the converted state against the model that is to take it.

        Raises:
            UserError: a tensor is missing, left over, or of another shape; the first ones are named.
        """
        for key, value in target.items():
            if key not in state:
                self.missing[key] = f"{key} {tuple(value.shape)}"
            elif state[key].shape != value.shape:
                theirs = self.loaded[key][0]
                self.unexpected[theirs] = f"{theirs} {tuple(state[key].shape)} where {tuple(value.shape)} belongs"
        for key in state.keys() - target.keys():
            theirs, shape = self.loaded[key]
            self.unexpected[theirs] = f"{theirs} {shape}"
        if not self.missing and not self.unexpected:
            return
        problems = [f"{word} {_some(keys)}" for word, keys in self._problems() if keys]
        fix = "give a file of the published architecture, or the config that it was trained with"
        raise UserError(f"does not fit the model ({'; '.join(problems)})", file=self.source, fix=fix)

    def text(self) -> str:
        """Every key and what became of it, for people."""
        lines = [f"source: {self.source}"]
        lines += [f"inferred from keys and shapes: {word} = {value!r}" for word, value in self.inferred.items()]
        lines += [f"published default taken: {word} = {value!r}" for word, value in self.assumed.items()]
        lines.append(f"{self.summary()}\n")
        for ours, (theirs, shape) in self.loaded.items():
            changed = f" ({self.converted[ours]})" if ours in self.converted else ""
            lines.append(f"loaded {ours} <- {theirs} {list(shape)}{changed}")
        lines += [f"unused {theirs} {list(shape)}: {why}" for theirs, (shape, why) in self.unused.items()]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The counts in one line."""
        return (
            f"{len(self.loaded)} tensors loaded ({len(self.converted)} of them converted), {len(self.unused)} unused, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )

    def _problems(self) -> tuple[tuple[str, list[str]], ...]:
        return ("missing:", list(self.missing.values())), ("unexpected:", list(self.unexpected.values()))


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
