"""Start one process per GPU (or per CPU rank) through accelerate, and say in one line how they ended."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.forwarding import TORCH_TAKES, Asked, forwarding, meet
from launch.terminal import print_error
from shards.errors import UserError

EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_HUNG = 75
_FAILURE_FILE = "MSMIL_FAILURE_FILE"
_FAILURE_NAME = "failure.txt"
_STOPPED = "stopped.txt"
_HUNG = "hung.txt"
_PEER_IS_GONE = (
    "closed by peer", "reset by peer", "broken pipe", "connection was closed", "remote process exited",
    "timed out waiting",
)  # fmt: skip
_PEER_WAIT_S = 10.0
_COLLECT_EVERY = 10_000  # new objects
_AGAIN = "the same command again goes on where it stopped"


def default_ranks() -> int:
    """How many ranks this machine trains on when nobody says."""
    import torch

    from msmil.engine import environment

    return environment.default_ranks(torch.cuda.device_count())


def refuse_ranks(ranks: int) -> None:
    """Refuse more ranks than there are GPUs, where they run on GPUs.

    Raises:
        UserError: two ranks would share one, which NCCL does not do.
    """
    import torch

    from msmil.engine.runtime import gpu_in_use

    if gpu_in_use() and ranks > (gpus := torch.cuda.device_count()):
        fix = f"ask for --ranks {gpus}, or leave it out"
        raise UserError(f"there are {gpus} GPUs for {ranks} ranks, and each needs one of its own", fix=fix)


def start_ranks(module: str, arguments: Sequence[str], *, ranks: int, precision: str, log: Path) -> int:
    """Run `python -m module arguments` in `ranks` processes of this machine and wait for them.

    Returns:
        0, or the exit code of the rank that failed first: 2 for a mistake of the user. The reason is printed and,
        where there is a log, is its last line.

    Raises:
        UserError: more ranks than GPUs.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    refuse_ranks(ranks)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is said below, once
    options = ["--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", {"fp32": "no"}.get(precision, precision), "--dynamo_backend", "no"]
    options += ["--num_cpu_threads_per_process", str(_threads(ranks))]
    if ranks > 1:
        options.append("--multi_gpu")  # accelerate's word for several processes, on CPUs too
    with _environment(module, arguments) as folder:
        # accelerate would read the user's default file otherwise: everything is said here
        layout = folder / "layout.yaml"
        layout.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n", encoding="utf-8")
        options += ["--config_file", str(layout)]
        args = launch_command_parser().parse_args([*options, "--module", module, *arguments])
        vars(args).update(TORCH_TAKES)  # accelerate hands on to torchrun what that one knows
        try:
            with forwarding(folder) as asked:
                launch_command(args)
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            return _explain(folder, log, f"rank {rank} (pid {first.pid})", first.exitcode, asked)
        except subprocess.CalledProcessError as error:  # a single rank runs under accelerate's simple launcher
            return _explain(folder, log, "the only rank", error.returncode, asked)
        except SignalException as error:
            return _explain(folder, log, "the launcher", -int(error.sigval), asked)
    return 0


def collect_seldom() -> None:
    """Let Python look for garbage more seldom than it does by itself (in 3.11 every 700 new objects).

    Torch and what leans on it make a million that stay; looking at them again and again takes an eighth of a start.
    """
    gc.set_threshold(_COLLECT_EVERY)


def rank_program(body: Callable[[], None]) -> int:
    """Run the body of one rank; a UserError becomes one line and exit code 2.

    Under start_ranks the line goes to the parent, which prints it once for all ranks. Under another launcher every rank
    that meets the mistake prints it, since a rank cannot know whether the others meet it too.
    """
    collect_seldom()
    from msmil.engine import watchdog
    from msmil.engine.preemption import Stopped

    file = os.environ.get(_FAILURE_FILE)
    if file is not None:
        watchdog.on_hang = _hand_over
    try:
        if file is not None:
            meet(Path(file).parent)
        body()
    except Stopped as stopped:
        # all is saved: a launcher that now ends those that are still ending (srun --kill-on-bad-exit) changes no code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if file is None:
            if os.environ.get("RANK", "0") == "0":  # they stopped together: one says it
                print(f"msmil: {stopped}; {_AGAIN}", file=sys.stderr)
        else:
            (Path(file).parent / _STOPPED).write_text(f"{stopped.signum} {stopped}\n", encoding="utf-8")
        return 128 + stopped.signum
    except UserError as error:
        if file is None:
            print_error(str(error))
        else:
            with Path(file).open("a", encoding="utf-8") as stream:
                stream.write(f"{error}\n")
        return EXIT_USER
    except KeyboardInterrupt:  # Ctrl-C, handed on by the launcher, which says it
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        if not _lost_a_peer(error):
            raise
        # another rank has the reason; the launcher hears of it within this time and ends this one too
        time.sleep(_PEER_WAIT_S)
        print("msmil: this rank lost another one", file=sys.stderr, flush=True)
        return 1
    return 0


@contextmanager
def cause_in(log: Path) -> Iterator[None]:
    """Where another launcher started this rank, the reason why what is in here ends becomes the last line of the log.

    Once for all ranks that have the same. start_ranks sees to it itself.
    """
    from msmil.engine.preemption import Stopped

    try:
        yield
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if isinstance(error, UserError):
            _tell(log, f"msmil: error: {error}")
        elif isinstance(error, Stopped):
            _tell(log, f"msmil: {error}; {_AGAIN}")
        elif not _lost_a_peer(error):
            first = next(iter(str(error).splitlines()), "")
            _tell(log, f"msmil: rank {rank} (pid {os.getpid()}) ended by {type(error).__name__}: {first}")
        raise


def _tell(log: Path, line: str) -> None:
    """Add a line to the log of a run, unless it is the last one already."""
    if os.environ.get(_FAILURE_FILE) is not None or not log.exists():
        return
    with contextlib.suppress(OSError), log.open("r+", encoding="utf-8") as file:  # the disk may be the reason
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.read().splitlines()[-1:] != [line]:
            file.write(line + "\n")


def _lost_a_peer(error: Exception) -> bool:
    """Whether another rank has ended first, and has the reason."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _PEER_IS_GONE)


def _hand_over(text: str, _: Path | None) -> None:
    """What the watchdog says goes to the parent, which prints it and adds it to the log."""
    Path(os.environ[_FAILURE_FILE]).with_name(_HUNG).write_text(text, encoding="utf-8")


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@contextmanager
def _environment(module: str, arguments: Sequence[str]) -> Iterator[Path]:
    """What the ranks inherit: where to write the reason of a failure, the command, whether to stay on the CPU.

    Yields a temporary folder.
    """
    import torch

    from msmil.engine.run_folder import COMMAND_VARIABLE

    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="msmil_") as folder:
        os.environ[_FAILURE_FILE] = str(Path(folder) / _FAILURE_NAME)
        os.environ[COMMAND_VARIABLE] = f"msmil {module.rpartition('.')[2]} {shlex.join(arguments)}"
        os.environ.pop("SLURM_STEP_NUM_TASKS", None)  # our ranks are not the tasks of the srun that we may be in
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


def _explain(folder: Path, log: Path, who: str, code: int, asked: Asked) -> int:
    """Print why it ended, add it to the log, and return the exit code."""
    failure, stopped, hung = folder / _FAILURE_NAME, folder / _STOPPED, folder / _HUNG
    if failure.exists():
        reason = failure.read_text(encoding="utf-8").splitlines()[0]
        print_error(reason)
        text, code = f"msmil: error: {reason}", EXIT_USER
    elif hung.exists():
        text, code = f"msmil: {hung.read_text(encoding='utf-8')}; {_AGAIN}", EXIT_HUNG
        print(text, file=sys.stderr)
    elif stopped.exists():
        number, _, words = stopped.read_text(encoding="utf-8").strip().partition(" ")
        text, code = f"msmil: {words}; {_AGAIN}", 128 + int(number)
        print(text, file=sys.stderr)
    elif signum := asked.ended(code):
        text, code = f"msmil: ended at once by {signal.Signals(signum).name}; {_AGAIN}", 128 + signum
        print(text, file=sys.stderr)
    elif code < 0:
        text = f"msmil: {who} was killed by {signal.Signals(-code).name}; {_AGAIN}"
        print(text, file=sys.stderr)
        code = 128 - code
    else:
        text = f"msmil: {who} ended with exit code {code}; its own words are above"
        print(text, file=sys.stderr)
    if log.exists():
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # the disk may be the reason
            file.write(text + "\n")
    return code
