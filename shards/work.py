"""A folder that is being filled: locked against a second process, claimed by one set of settings, resumed after a kill.

What is under way lies in a working folder inside it, which goes when the folder is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shards.errors import UserError
from shards.files import atomic_file, remove_leftovers

_PLAN_NAME: Final = "plan.json"
_LOCK_NAME: Final = "lock"


@contextmanager
def locked(work: Path, *, verb: str) -> Iterator[None]:
    """Hold the lock of the folder that `work` lies in; the kernel gives it back when this process dies.

    Args:
        work: the working folder; created where it is missing, removed again where nothing was put into it.
        verb: what a process does that holds the lock, for the message: "packs".

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    out = work.parent
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot be written to ({error.strerror})", fix="choose another folder", file=out) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another process {verb} into this folder", fix="wait until it ends", file=out) from error
    finally:
        os.close(descriptor)
        _remove_if_unused(work)


def start_or_resume(work: Path, settings: Mapping[str, Any], *, rows_name: str, explained: Mapping[str, str]) -> None:
    """Claim the folder for these settings, or go on with what the same settings began.

    Args:
        work: the working folder, locked.
        settings: what is asked for, as JSON holds it.
        rows_name: the file of rows beside the tars, which with them is taken for somebody else's where nothing
            was begun here.
        explained: as for `check_same`.

    Raises:
        UserError: the folder holds something else.
    """
    out, path = work.parent, work / _PLAN_NAME
    if path.exists():
        check_same(out, json.loads(path.read_text("utf-8")), settings, explained=explained)
    else:
        foreign = sorted(item.name for item in out.glob("shard-*.tar")) + [rows_name] * (out / rows_name).exists()
        if foreign:
            fix = "choose an empty folder, or delete what is in this one"
            raise UserError(f"holds {foreign[0]} of something else", fix=fix, file=out)
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode())
    remove_leftovers(out)
    remove_leftovers(work)


def check_same(
    out: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, explained: Mapping[str, str], made: str = "packed"
) -> None:
    """Refuse to mix two inputs in a folder; says in what they differ.

    Args:
        out: the folder.
        before: the settings that it was begun with.
        now: those asked for.
        explained: words for a setting whose two values would tell nobody anything.
        made: what was done with the input.
    """
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        key = changed[0]
        what = explained.get(key, f"{key} was {before.get(key)}, now {now[key]}")
        fix = "use another folder, delete this one, or give the former table and options"
        raise UserError(f"was {made} with other input: {what}", fix=fix, file=out)


def _remove_if_unused(work: Path) -> None:
    """Leave no working folder behind where there was nothing to work on."""
    if work.is_dir() and [item.name for item in work.iterdir()] == [_LOCK_NAME]:
        shutil.rmtree(work)
