"""`python -m launch.reference`: the table of all options for the README, from the dataclasses' own docs."""

from __future__ import annotations

from msmil.config_io import reference

_PIPE = "\\|"  # a bare one would end the cell


def markdown() -> str:
    """One table row per option: key, default, meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in reference():
        cells = (f"`{option.key}`", f"`{option.default}`", f"{option.doc} ({option.kind})")
        rows.append(f"| {' | '.join(cell.replace('|', _PIPE) for cell in cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
