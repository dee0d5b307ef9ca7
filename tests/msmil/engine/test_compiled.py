"""What torch.compile keeps for a run outlives orderly ends, and nothing half-written outlives a killed process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch._inductor import codecache

from msmil.config import TrainConfig
from msmil.engine.compiled import VARIABLE, cache_of, use_own_cache
from msmil.engine.runtime import Runtime
from shards.errors import UserError
from tests.runs import reset
from tests.worlds import run

PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    import torch._inductor.config
    from msmil.engine.compiled import use_own_cache

    alone = SimpleNamespace(rank=0, node_ranks=(0,), gather=lambda value: [value])
    emptied = use_own_cache(Path(sys.argv[1]), alone)
    if emptied:
        sys.exit("emptied")  # what follows is a first start
    torch._inductor.config.cpp_cache_precompile_headers = False  # 150 MB, for one function
    torch._inductor.config.compile_threads = 1  # each would start a process
    compiled = torch.compile(lambda x: (x.sin() + 1).cos().sum())
    print(float(compiled(torch.zeros(64))), flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def start(run_folder: Path, temporary: Path, *, dies: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(run_folder), "dies" if dies else "ends"]
    return run(command, deadline_s=240, TMPDIR=str(temporary))


@pytest.mark.slow
def test_half_a_library_of_a_killed_compiler_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would take it for a whole one."""
    monkeypatch.delenv(VARIABLE, raising=False)  # torch writes it in this process, too
    folder, caches = tmp_path / "run", tmp_path / f"msmil-compiled-{os.getuid()}"
    killed = start(folder, tmp_path, dies=True)
    assert (killed.returncode, len(killed.stdout.split())) == (-signal.SIGKILL, 1), killed.stderr
    for path in (libraries := list(caches.rglob("*.so"))):
        os.truncate(path, 100)
    assert libraries
    assert len(list(caches.glob("*/in_use/*"))) == 1
    again = start(folder, tmp_path, dies=False)
    assert again.stderr.splitlines()[-1] == "emptied", again.stderr
    assert not list(caches.rglob("*.so"))
    assert not list(caches.glob("*/in_use/*")), "its end was orderly"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, getattr(codecache, name))
    reset()
    return Runtime(TrainConfig(precision="fp32"), quiet=True)


def test_a_folder_named_by_the_user_is_used_as_it_is(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert not use_own_cache(tmp_path / "run", runtime)
    assert os.environ[VARIABLE] == str(tmp_path / "mine")
    assert not cache_of(tmp_path / "run").exists()


def test_each_run_has_its_own_and_nobody_else_can_write_there(runtime: Runtime, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert not use_own_cache(tmp_path / name, runtime)
        assert os.environ[VARIABLE] == str(cache_of(tmp_path / name))
        assert Path(codecache._HEADER_DIR).is_relative_to(cache_of(tmp_path / name)), "compiled headers, too"
    assert cache_of(tmp_path / "one") != cache_of(tmp_path / "two")
    assert stat.S_IMODE(cache_of(tmp_path / "one").parent.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_named(runtime: Runtime, tmp_path: Path) -> None:
    cache_of(tmp_path / "run").parent.write_text("a file")
    with pytest.raises(UserError, match=f"cannot be made ready for torch.compile .*{VARIABLE}") as raised:
        use_own_cache(tmp_path / "run", runtime)
    assert raised.value.file == str(cache_of(tmp_path / "run"))


def test_a_folder_that_others_can_write_to_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    cache_of(tmp_path / "run").parent.mkdir()
    cache_of(tmp_path / "run").parent.chmod(0o777)
    with pytest.raises(UserError, match=f"others can write.*{VARIABLE}"):
        use_own_cache(tmp_path / "run", runtime)
