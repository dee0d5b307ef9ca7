"""Careful looks into files of any version: what is missing, of another type, or not finite is None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def at(tree: Any, *keys: str) -> Any:
    """tree[a][b][c], or None where something on the way is no mapping or lacks the key."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def mapping_at(tree: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping there, or an empty one."""
    found = at(tree, *keys)
    return found if isinstance(found, Mapping) else {}


def number_at(tree: Any, *keys: str) -> float | None:
    """The finite number there, or None."""
    found = at(tree, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found


def whole_at(tree: Any, *keys: str) -> int | None:
    """The whole number there, or None."""
    found = at(tree, *keys)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def bounds_at(tree: Any, *keys: str) -> tuple[float, float] | None:
    """The two finite bounds there, or None."""
    found = at(tree, *keys)
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = (number_at({"x": value}, "x") for value in found)
    return None if low is None or high is None else (low, high)


def text_at(tree: Any, *keys: str) -> str:
    """The text there, or an empty one."""
    found = at(tree, *keys)
    return found if isinstance(found, str) else ""


def list_at(tree: Any, *keys: str) -> list[Any]:
    """The list there, or an empty one."""
    found = at(tree, *keys)
    return found if isinstance(found, list) else []
