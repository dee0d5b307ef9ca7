"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, indent: int = 0) -> list[str]:
    """Rows of equal length as lines, the first `left` columns flush left and the others flush right.

    >>> aligned([["run", "step"], ["demo", "7"]])
    ['run   step', 'demo     7']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return [" " * indent + "  ".join(row).rstrip() for row in cells]
