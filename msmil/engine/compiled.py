"""Where torch.compile keeps what it compiled: a folder of this machine for each run.

A process that is killed while a compiler writes leaves half a file behind, which torch takes for a whole one at every
later start. So processes leave a mark in the folder while they live, and where one is found at a start the folder is
emptied: what is lost is the time of compiling again.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.engine.runtime import Runtime

VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
_MARKS: Final = "in_use"
_ELSEWHERE: Final = f"name a folder of your own by {VARIABLE}"


def use_own_cache(run_folder: Path, runtime: Runtime) -> bool:
    """Let this process's torch.compile keep what it compiles for this run; all ranks together.

    A folder that the user names by TORCHINDUCTOR_CACHE_DIR is used as it is.

    Returns:
        whether a killed process had left its mark on a machine, and that machine's folder was emptied.

    Raises:
        UserError: the folder cannot be written, or belongs to somebody else, who could put programs into it.
    """
    if _named_by_user():
        return False
    cache = cache_of(run_folder)
    found = runtime.gather(_first_look(cache) if runtime.rank == runtime.node_ranks[0] else False)
    for error in found:
        if isinstance(error, UserError):
            raise error
    mark = cache / _MARKS / str(os.getpid())
    mark.touch()
    atexit.register(_take_away, mark, os.getpid())
    os.environ[VARIABLE] = str(cache)
    _move_headers(cache)
    return any(found)


def _first_look(cache: Path) -> bool | UserError:
    try:
        return _make_whole(cache)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"cannot be made ready for torch.compile ({error.strerror})", fix=_ELSEWHERE, file=cache)


def _move_headers(cache: Path) -> None:
    """Compiled headers of CPU kernels, which torch keeps beside all caches, where there are any."""
    from torch._inductor import codecache

    for name, folder in (("_HEADER_DIR", cache / "headers"), ("_HEADER_LOCK_DIR", cache / "headers" / "locks")):
        if hasattr(codecache, name):
            setattr(codecache, name, str(folder))


def cache_of(run_folder: Path) -> Path:
    """The folder of a run on this machine, the user's own."""
    name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"msmil-compiled-{os.getuid()}" / name


def _named_by_user() -> bool:
    """Torch, and another run of this process, write the variable too."""
    ours = (f"{tempfile.gettempdir()}/torchinductor_", f"{tempfile.gettempdir()}/msmil-compiled-")
    return not os.environ.get(VARIABLE, ours[0]).startswith(ours)


def _make_whole(cache: Path) -> bool:
    """See that the folder is there and holds nothing half-written; whether it had to be emptied."""
    cache.parent.mkdir(mode=0o700, exist_ok=True)
    status = cache.parent.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        thing = "torch.compile would load programs from here, where others can write"
        raise UserError(thing, fix=_ELSEWHERE, file=cache.parent)
    marks = cache / _MARKS
    killed = marks.is_dir() and any(marks.iterdir())
    if killed:
        shutil.rmtree(cache)
    marks.mkdir(parents=True, exist_ok=True)
    return killed


def _take_away(mark: Path, pid: int) -> None:
    """At the orderly end of the process that left the mark, not of one that was forked from it."""
    if os.getpid() == pid:
        mark.unlink(missing_ok=True)
