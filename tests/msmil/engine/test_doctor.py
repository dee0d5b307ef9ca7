"""`msmil doctor`'s checks, each caused to fail, with its fix."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msmil.config import Config
from msmil.engine.doctor.accelerators import check_torch, driver_line
from msmil.engine.doctor.check import Check
from msmil.engine.doctor.child import Answer, ask, run
from msmil.engine.doctor.machine import (
    check_cores,
    check_environment,
    check_memory,
    check_open_files,
    check_slurm,
    control_groups,
)
from msmil.engine.doctor.software import check_compiler, check_deepspeed, check_packages, check_python, find_compiler
from msmil.engine.doctor.storage import (
    check_data,
    check_experiment,
    check_folder,
    check_packed_folders,
    check_shared_memory,
    check_temporary,
)
from tests.faults.test_full_disk import fill, small_disk  # noqa: F401

GIGABYTE = 10**9


def stands(check: Check, state: str, *texts: str) -> None:
    """The check has this state, and its line holds these texts."""
    assert check.state == state, check
    for text in texts:
        assert text in f"{check.text} {check.fix}", check


def settings(**data: Any) -> Config:
    return replace(Config(), data=replace(Config().data, **data))


def versions(**known: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return version


def child(code: str, *, deadline_s: float = 60) -> Answer:
    return ask([sys.executable, "-c", code], deadline_s=deadline_s)


TELL = "print('noise'); print('{\"a\": 1}', flush=True); "


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise OSError('libcuda.so.1 is missing')", "OSError: libcuda.so.1 is missing"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_child_that_ends_early_has_told_what_it_knew(code: str, failure: str) -> None:
    assert child(TELL + code) == Answer({"a": 1}, failure)


def test_a_child_that_hangs_is_killed() -> None:
    assert child(TELL + "import time; time.sleep(600)", deadline_s=2) == Answer({"a": 1}, "no answer within 2 s")
    assert (
        run(["/no/such/program"], deadline_s=1)[1] == "/no/such/program cannot be started (No such file or directory)"
    )


def test_python() -> None:
    stands(check_python(">=3.11", "3.12.1"), "ok", "3.12.1")
    stands(check_python(None, "3.12.1"), "ok")
    stands(check_python(">=3.11", "3.10.4"), "broken", "3.10.4 is not >=3.11", "venv")


def test_packages() -> None:
    needed = ["torch>=2.11", "timm>=1.0.20", 'pytest>=8; extra == "dev"']
    stands(check_packages(needed, versions(torch="2.14.1+cu130", timm="1.0.31")), "ok", "2 in range", "2.14.1+cu130")
    stands(check_packages(needed, versions(torch="2.9.0", timm="1.0.31")), "broken", "torch 2.9.0 is not >=2.11")
    stands(check_packages(needed, versions(torch="2.11")), "broken", "timm is missing", "pip install 'timm>=1.0.20'")
    stands(check_packages(None), "warning", "not installed", "pip install -e .")


def test_compiler(tmp_path: Path) -> None:
    refuses = tmp_path / "c++"
    refuses.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    refuses.chmod(0o755)
    stands(check_compiler(None), "warning", "none on PATH", "install g++")
    stands(check_compiler(str(refuses)), "warning", "does not compile (no room)")
    assert find_compiler(str(refuses)) == str(refuses)
    assert find_compiler("no_such_compiler") is None
    works = shutil.which("true")
    assert works is not None
    stands(check_compiler(works, tmp_path), "warning", f"{tmp_path}/Python.h is missing")
    (tmp_path / "Python.h").touch()
    stands(check_compiler(works, tmp_path), "ok", works)


@pytest.mark.parametrize(
    ("installed", "answer", "ninja", "lines"),
    [
        ({}, Answer({}), None, [("warning", "not installed", "pip install deepspeed transformers ninja")]),
        ({"deepspeed": "0.19"}, Answer({}, "killed by SIGILL"), None, [("warning", "SIGILL", "pip uninstall")]),
        (
            {"deepspeed": "0.19"},
            Answer({"imported": True, "built": "CPUAdam"}),
            "/bin/ninja",
            [("warning", "not transformers", "pip install transformers"), ("ok", "CPUAdam compiles", "")],
        ),
        (
            {"deepspeed": "0.19", "transformers": "5"},
            Answer({"imported": True}, "RuntimeError: Error building extension"),
            "/bin/ninja",
            [("ok", "0.19", ""), ("warning", "Error building extension", "C++ compiler")],
        ),
        (
            {"deepspeed": "0.19", "transformers": "5"},
            Answer({"imported": True}, "RuntimeError"),
            None,
            [("ok", "0.19", ""), ("warning", "no ninja", "pip install ninja")],
        ),
    ],
)
def test_deepspeed(
    installed: dict[str, str], answer: Answer, ninja: str | None, lines: list[tuple[str, str, str]]
) -> None:
    found = list(check_deepspeed(lambda: answer, versions(**installed), ninja))
    assert len(found) == len(lines)
    for check, (state, text, fix) in zip(found, lines, strict=True):
        stands(check, state, text, fix)


FACTS: dict[str, Any] = {
    "torch": "2.14",
    "torch_cuda": "13.0",
    "torchvision": {"value": "0.29"},
    "tensorboard": {"value": "2.20"},
    "training": {"value": None},
    "gloo": {"value": "2 processes"},
    "num_gpus": 2,
    "nccl": {"value": "2 processes"},
    "gpus": {"value": [{"name": "H100", "free_bytes": 79 * GIGABYTE, "total_bytes": 80 * GIGABYTE, "bf16": True}] * 2},
    "bf16": {"value": None},
}
NONE = {"num_gpus": 0, "gpus": {"value": []}}
DRIVER = "2 x H100, driver 550"


def torch_lines(driver: str | None = DRIVER, visible: str | None = None, **changes: Any) -> dict[str, Check]:
    answer = Answer({key: value for key, value in (FACTS | changes).items() if value != "absent"}, "killed by SIGSEGV")
    return {check.name: check for check in check_torch(answer, driver=driver, visible=visible)}


def test_two_gpus() -> None:
    found = torch_lines()
    assert {check.state for check in found.values()} == {"ok"}
    stands(found["GPU 1"], "ok", "H100, 79.0 GB of 80.0 GB free")
    stands(found["GPU driver"], "ok", "550")
    stands(found["NCCL"], "ok", "2 processes sum over GPUs")


@pytest.mark.parametrize(
    ("name", "changes", "state", "texts"),
    [
        ("torchvision", {"torchvision": {"error": "nms does not exist"}}, "broken", ("nms", "constraints.txt")),
        ("TensorBoard", {"tensorboard": {"error": "no module"}}, "broken", ("no module", "pip install")),
        ("training code", {"training": {"error": "no timm"}}, "broken", ("no timm",)),
        ("gloo", {"gloo": {"error": "connection refused"}}, "broken", ("refused", "GLOO_SOCKET_IFNAME")),
        ("gloo", {"gloo": "absent"}, "broken", ("SIGSEGV", "torch_child")),
        ("torch", {"torch": "absent"}, "broken", ("SIGSEGV", "pip install torch")),
        ("GPUs", {**NONE, "driver": None}, "warning", ("no nvidia-smi", "CPU ranks")),
        ("GPUs", {**NONE, "visible": "7"}, "warning", ("CUDA_VISIBLE_DEVICES=7 hides", "unset")),
        ("GPUs", {**NONE, "torch_cuda": None}, "broken", ("CPU alone", "constraints.txt")),
        ("GPUs", NONE, "broken", ("cannot use them", "update the driver to one for CUDA 13.0")),
        ("GPUs", {"gpus": {"error": "no kernel image"}}, "broken", ("no kernel image", "nvidia-smi")),
        (
            "GPU 0",
            {"gpus": {"value": [{"name": "T4", "free_bytes": 1, "total_bytes": 16, "bf16": True}]}},
            "warning",
            ("something else uses it", "nvidia-smi"),
        ),
        ("NCCL", {"nccl": {"error": "unhandled"}}, "broken", ("unhandled", "NCCL_DEBUG=INFO")),
        ("NCCL", {"nccl": {"error": "unhandled"}, "num_gpus": 1}, "warning", ("unhandled",)),
        (
            "bf16",
            {"gpus": {"value": [{"name": "T4", "free_bytes": 16, "total_bytes": 16, "bf16": False}]}},
            "warning",
            ("T4 has no bf16 units", "fp16"),
        ),
        ("bf16", {"bf16": {"error": "not implemented"}}, "broken", ("not implemented", "fp32")),
        ("bf16", {**NONE, "bf16": {"value": False}}, "ok", ("no instructions", "no faster than fp32")),
    ],
)
def test_what_torch_cannot_do(name: str, changes: dict[str, Any], state: str, texts: tuple[str, ...]) -> None:
    stands(torch_lines(**changes)[name], state, *texts)


def test_nothing_is_said_of_what_was_not_reached() -> None:
    assert list(torch_lines(gloo="absent", num_gpus="absent", bf16="absent"))[-1] == "gloo"


def test_the_driver_in_one_line() -> None:
    assert driver_line("NVIDIA A100, 550.54\nNVIDIA A100, 550.54\n") == "2 x NVIDIA A100, driver 550.54"
    assert driver_line("No devices were found\n") is None


def test_cores() -> None:
    stands(check_cores(64, 64, ["max 100000\n"], settings(workers=8), 4), "ok", "64 of 64")
    stands(check_cores(64, 4, [], settings(workers=8), 2), "warning", "4 of 64", "data.workers=2", "--cpus-per-task")
    stands(check_cores(64, 64, ["max 100000", "150000 100000\n"], settings(workers=1), 2), "warning", "1.5 of 64")
    stands(check_cores(2, 2, [], settings(workers=0), 2), "ok")


def test_memory() -> None:
    meminfo = "MemTotal:  32000000 kB\nMemAvailable:   16000000 kB\n"
    stands(check_memory(meminfo, ["max\n"]), "ok", "16.4 GB")
    stands(check_memory(meminfo, ["max\n", "2000000000\n"]), "warning", "2.0 GB", "--mem")
    stands(check_memory("MemAvailable: 100 kB\n", []), "warning", "102.4 kB")


def test_control_groups_are_those_of_the_process_and_above(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7\n")
    root = tmp_path / "fs"
    assert control_groups(root, own) == [root / "slurm/job_7", root / "slurm", root]
    assert control_groups(root, tmp_path / "missing") == [root]


def test_open_files() -> None:
    stands(check_open_files(1024), "ok")
    stands(check_open_files(256), "warning", "256", "ulimit -n 4096")


def test_environment() -> None:
    stands(check_environment(Config(), {}), "ok")
    stands(check_environment(Config(), {"ACCELERATE_MIXED_PRECISION": "fp8"}), "broken", "fp8 contradicts", "leave it")


def test_slurm() -> None:
    stands(check_slurm(None, None, None), "ok", "a workstation needs none")
    stands(check_slurm("/bin/sbatch", ("main*\nhigh\nmain*\n", ""), "7"), "ok", "main*, high", "this is job 7")
    stands(check_slurm("/bin/sbatch", ("", "no answer within 20 s"), None), "warning", "no answer", "SLURM_CONF")
    stands(check_slurm("/bin/sbatch", None, None), "warning", "there is no sinfo")


def test_folders(tmp_path: Path) -> None:
    new = tmp_path / "runs" / "of" / "mine"
    stands(check_folder("output_dir", new, (0, 0), "choose another"), "ok", str(new), "can be written")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    stands(check_folder("output_dir", new, (0, 10**18), "choose another"), "warning", "free", "make room")
    stands(check_folder("output_dir", new, (10**18, 10**18), "choose another"), "broken", "make room")
    (tmp_path / "file").touch()
    stands(check_folder("output_dir", tmp_path / "file" / "x", (0, 0), "choose another"), "broken", "is no folder")
    stands(check_folder("output_dir", Path("/proc/runs"), (0, 0), "choose another"), "broken", "cannot be written")


def test_a_full_disk(small_disk: Path) -> None:  # noqa: F811
    fill(small_disk / "ballast")
    stands(check_folder("output_dir", small_disk, (0, 0), "choose another"), "broken", "No space left on device")


def test_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    stands(check_temporary(), "broken", "No usable temporary directory", "TMPDIR")


def test_shared_memory(tmp_path: Path) -> None:
    config = settings(workers=2)
    stands(check_shared_memory(config, 10**6, tmp_path), "ok", "64.0 MB")
    stands(check_shared_memory(config, 10**15, tmp_path), "broken", "need about", "--shm-size")
    stands(check_shared_memory(config, None, tmp_path / "none"), "broken", "cannot be used")
    stands(check_shared_memory(settings(workers=0), 10**15, tmp_path), "ok", "not needed")


def test_little_shared_memory_is_a_warning_where_no_data_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msmil.engine.doctor.storage.free_bytes", lambda _: 64_000_000)
    stands(check_shared_memory(settings(workers=2), None, tmp_path), "warning", "64.0 MB", "--shm-size")


def test_data_of_an_experiment(packed: Path, tmp_path: Path) -> None:
    check, image_bytes = check_data(settings(shards=str(packed)))
    stands(check, "ok", "train", "64 x 48 pixels with Mass")
    assert image_bytes == 64 * 48
    stands(check_data(settings(shards=str(packed), labels=("Mas",)))[0], "broken", "'Mas'", "choose from")
    stands(check_data(settings(shards=str(tmp_path)))[0], "broken", str(tmp_path), "msmil pack")
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    next(copy.glob("*.tar")).unlink()
    stands(check_data(settings(shards=str(copy)))[0], "broken", ".tar: missing")
    stands(check_data(settings(shards=str(copy), on_error="skip"))[0], "warning", ".tar: missing", "would be skipped")


def test_packed_data_of_the_current_folder(packed: Path, tmp_path: Path) -> None:
    stands(next(check_packed_folders(tmp_path)), "warning", "none in data/shards", "msmil pack")
    shutil.copytree(packed, tmp_path / "data" / "mine" / "shards")
    (tmp_path / "data" / "shards").mkdir()
    first, second = check_packed_folders(tmp_path)
    stands(first, "broken", "no manifest.json")
    stands(second, "ok", "96 images", "Mass")


def test_experiment() -> None:
    stands(check_experiment({"value": 2}), "ok", "2 ranks")
    found = {"error": "no label", "fix": "choose", "file": "x"}
    stands(check_experiment(found), "broken", "x: no label", "choose")
    stands(check_experiment({"error": "KeyError: 'a'"}), "broken", "KeyError", "msmil train")
