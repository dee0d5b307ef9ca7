"""`python -m launch.reference`: the table of all options for the README, from the dataclasses' own docs."""

from __future__ import annotations

from msmil.config_io import reference


def markdown() -> str:
    """One table row per option: key, default, meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in reference():
        kind = option.kind.replace("|", "\\|")
        rows.append(f"| `{option.key}` | `{option.default}` | {option.doc} ({kind}) |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
