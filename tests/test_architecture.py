"""The house: imports run one way, files and functions stay short, starting is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "msmil", "slurm", "launch")  # each may import those before it
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
LONGEST_FILE, LONGEST_FUNCTION = 310, 80


def imported(file: Path) -> Iterator[str]:
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_run_one_way(file: Path) -> None:
    order = PACKAGES.index(module(file).partition(".")[0])
    later = [name for name in imported(file) if name.partition(".")[0] in PACKAGES[order + 1 :]]
    assert not later, f"{module(file)} imports {later}"


@pytest.mark.parametrize(
    ("inside", "forbidden"),
    [
        ("msmil.models", ("msmil.engine", "msmil.evaluation", "msmil.detection", "msmil.reporting", "accelerate")),
        ("msmil.bags", ("msmil.engine", "msmil.models")),
        ("msmil.evaluation", ("msmil.engine", "msmil.models", "torch")),
        ("msmil.detection", ("msmil.engine", "msmil.models")),
        ("msmil.reporting", ("msmil.engine", "msmil.models")),
        ("msmil.config", ("torch", "timm", "accelerate")),
    ],
)
def test_parts_do_not_know_each_other(inside: str, forbidden: tuple[str, ...]) -> None:
    for file in FILES:
        if module(file).startswith(inside):
            found = [name for name in imported(file) if name.startswith(forbidden)]
            assert not found, f"{module(file)} imports {found}"


def test_accelerate_and_deepspeed_are_configured_in_one_place() -> None:
    def users(package: str) -> set[str]:
        return {module(file) for file in FILES if any(name.partition(".")[0] == package for name in imported(file))}

    assert users("accelerate") == {"msmil.engine.runtime", "launch.ranks"}
    assert users("deepspeed") == {"msmil.engine.runtime", "msmil.engine.zero"}, (
        "one configures it, the other puts divided weights together; nothing else knows it"
    )


@pytest.mark.parametrize("file", FILES, ids=module)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, f"{module(file)}.{node.name}"


LIBRARIES = {"torch", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "timm", "accelerate", "shtab"}


@pytest.mark.parametrize(
    "code",
    [
        "import msmil",
        "import launch.cli; launch.cli.build_parser().format_help()",
        "import launch.cli; launch.cli.main(['runs', 'tests'])",
        "import msmil.engine.doctor.examine",
    ],
)
def test_starting_loads_no_torch(code: str) -> None:
    """Nor any other library that takes its time."""
    check = f"import sys; {code}; print('loaded:', *{LIBRARIES!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
