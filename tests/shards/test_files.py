"""A folder that is replaced is whole under one name or the other, wherever its process is killed."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.files import atomic_folder, free_bytes, put_back_folders, remove_leftovers

# A process that kills itself in front of a certain rename or deletion of the work that it is given.
KILLED = """
import os, pathlib, shutil, signal, sys
from shards.files import atomic_folder, remove_folder

def deadly(function, call):
    calls = iter(range(1, 100))
    def killed(*arguments, **more):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return killed

what, path, call = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
if what == "replace":
    pathlib.Path.rename = deadly(pathlib.Path.rename, call)
    with atomic_folder(path) as folder:
        (folder / "content").write_text("new")
else:
    os.unlink = deadly(os.unlink, call)
    remove_folder(path)
"""
BETWEEN_THE_RENAMES = 2


def made(path: Path, text: str = "old") -> Path:
    path.mkdir()
    for name in ("content", "more"):
        (path / name).write_text(text)
    return path


def kill(what: str, path: Path, *, call: int) -> None:
    command = [sys.executable, "-c", KILLED, what, str(path), str(call)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mend", [put_back_folders, remove_leftovers])
def test_killed_while_it_is_replaced_the_old_one_comes_back(tmp_path: Path, mend) -> None:
    kill("replace", made(tmp_path / "step_1"), call=BETWEEN_THE_RENAMES)
    assert "step_1" not in names(tmp_path), "the old one has left, and the new one has not come"
    mend(tmp_path)
    assert (tmp_path / "step_1" / "content").read_text() == "old"
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step_1"]


def test_killed_once_it_is_replaced_the_new_one_stays(tmp_path: Path) -> None:
    path = made(tmp_path / "step_1", "new")
    made(tmp_path / ".step_1.123.old")
    put_back_folders(tmp_path)
    assert (path / "content").read_text() == "new"
    assert names(tmp_path) == ["step_1"]


def test_where_the_new_one_cannot_take_its_name_the_old_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = made(tmp_path / "step_1"), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "the disk does not answer")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="does not answer"), atomic_folder(path) as folder:
        (folder / "content").write_text("new")
    assert (path / "content").read_text() == "old"
    assert names(tmp_path) == ["step_1"]


def test_what_was_half_deleted_does_not_come_back(tmp_path: Path) -> None:
    kill("remove", made(tmp_path / "step_1"), call=2)
    put_back_folders(tmp_path)
    assert "step_1" not in names(tmp_path)
    remove_leftovers(tmp_path)
    assert not names(tmp_path)


def test_a_file_system_without_a_limit_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs that is mounted with size=0 (podman run --shm-size=0) tells no sizes."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert free_bytes(tmp_path) == sys.maxsize
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10, used=10, free=0))
    assert free_bytes(tmp_path) == 0
