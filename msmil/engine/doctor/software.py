"""Versions, compilers, DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from msmil.engine.doctor.check import Check, broken, ok, warning
from msmil.engine.doctor.child import Answer, run

Version = Callable[[str], str]

_SHOWN: Final = ("torch", "torchvision", "timm", "accelerate", "webdataset")
_COMPILE_S: Final = 60.0
_REINSTALL: Final = "pip install -e . in the folder of msmil"


def check_python(requires: str | None, version: str = platform.python_version()) -> Check:
    """Python against the range of the package."""
    if requires is None:
        return ok("Python", version)
    if SpecifierSet(requires).contains(version):
        return ok("Python", f"{version} ({requires})")
    return broken(
        "Python", f"{version} is not {requires}", f"make a venv with Python {requires} and install msmil in it"
    )


def check_packages(requirements: Sequence[str] | None, installed: Version = importlib.metadata.version) -> Check:
    """Every package that msmil needs against its range.

    Args:
        requirements: of the installed msmil, None where it is not installed.
        installed: the version of a package; raises PackageNotFoundError.
    """
    if requirements is None:
        return warning("packages", "msmil is not installed: no versions to compare with", _REINSTALL)
    needed = [requirement for requirement in map(Requirement, requirements) if _applies(requirement)]
    wrong, versions = [], {}
    for requirement in needed:
        try:
            found = versions[requirement.name] = installed(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((requirement, f"{requirement.name} is missing"))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, f"{requirement.name} {found} is not {requirement.specifier}"))
    if wrong:
        names = " ".join(f"'{requirement}'" for requirement, _ in wrong)
        return broken("packages", "; ".join(text for _, text in wrong), f"pip install {names}")
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    return ok("packages", f"{len(needed)} in range, among them {shown}")


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def check_compiler(compiler: str | None, include: Path | None = None) -> Check:
    """A C++ compiler that compiles, and the headers of Python; torch.compile and DeepSpeed need both.

    Args:
        compiler: its path, or None where there is none.
        include: where Python.h should lie, by default this Python's own.
    """
    needs = "train.compile and DeepSpeed's operators need one"
    fix = (
        "install g++ and the headers of this Python (Debian: apt install g++ python3-dev), or keep train.compile: false"
    )
    if compiler is None:
        return warning("C++ compiler", f"none on PATH; {needs}", fix)
    with tempfile.TemporaryDirectory(prefix="msmil_") as folder:
        source = Path(folder) / "a.cpp"
        source.write_text("#include <vector>\nint size() { return std::vector<int>(3).size(); }\n", encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", "-o", str(source.with_suffix(".so")), str(source)]
        _, failure = run(command, deadline_s=_COMPILE_S)
    if failure:
        return warning("C++ compiler", f"{compiler} does not compile ({failure}); {needs}", fix)
    headers = (include or Path(sysconfig.get_paths()["include"])) / "Python.h"
    if not headers.exists():
        return warning("C++ compiler", f"{compiler} works, but {headers} is missing; {needs}", fix)
    return ok("C++ compiler", compiler)


def find_compiler(chosen: str | None) -> str | None:
    """The path of the compiler that CXX chooses, else of the first known one."""
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if (path := shutil.which(name)) is not None:
            return path
    return None


def check_deepspeed(
    answer: Callable[[], Answer], installed: Version = importlib.metadata.version, ninja: str | None = None
) -> Iterator[Check]:
    """DeepSpeed, which is optional: its import and the build of an operator, in a process of its own.

    Args:
        answer: asks msmil.engine.doctor.deepspeed_child; called only where DeepSpeed is installed.
        installed: the version of a package; raises PackageNotFoundError.
        ninja: the path of ninja, or None where there is none.
    """
    try:
        version = installed("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install deepspeed transformers ninja, if you want to try it"
        yield warning("DeepSpeed", "not installed; training with DDP does not need it", fix)
        return
    found = answer()
    if "imported" not in found.facts:
        fix = "pip install --force-reinstall deepspeed, or pip uninstall deepspeed: DDP does not need it"
        yield warning("DeepSpeed", f"{version} cannot be imported ({found.failure})", fix)
        return
    try:
        installed("transformers")
    except importlib.metadata.PackageNotFoundError:
        text = f"{version} is there, but not transformers, which accelerate asks for when it starts DeepSpeed"
        yield warning("DeepSpeed", text, "pip install transformers")
    else:
        yield ok("DeepSpeed", version)
    if "built" in found.facts:
        yield ok("DeepSpeed build", f"{found.facts['built']} compiles")
        return
    reason = "there is no ninja" if ninja is None else found.failure
    fix = (
        "pip install ninja"
        if ninja is None
        else "mend the C++ compiler (on GPUs: install the CUDA toolkit of torch), or remove ~/.cache/torch_extensions"
    )
    yield warning("DeepSpeed build", f"its operators cannot be compiled ({reason})", fix)
