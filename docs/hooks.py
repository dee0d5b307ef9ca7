"""What mkdocs makes beside the written pages: the first page, which is the README, and the references."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout documents itself, whatever else is installed


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def generated_pages() -> dict[str, str]:
    """{path below docs/: Markdown}."""
    from launch.reference import command_page, configuration_page

    return {
        "index.md": first_page((ROOT / "README.md").read_text(encoding="utf-8")),
        "reference/configuration.md": configuration_page(),
        "reference/commands.md": command_page(),
    }


def first_page(readme: str) -> str:
    """The README, whose links are below the folder of the pages there, and from it here."""
    return re.sub(r"\]\(docs/", "](", readme)
