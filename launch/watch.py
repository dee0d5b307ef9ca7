"""`msmil watch RUN...`: TensorBoard on runs, each by its name."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from launch.commands import Commands
from shards.errors import UserError

_DEPTH: Final = 3  # how deep beneath a named folder runs are looked for: runs/<sweep>/<repeat>/run_0
_RESCAN_S: Final = 10.0  # runs that begin later appear too
_IMAGES: Final = (10, 100)  # images of a tag that TensorBoard keeps: its own default, and the most
_ALL_IMAGES: Final = 1000  # over all runs, so that a hundred of them fit the memory


def add_parser(commands: Commands) -> None:
    """Add `msmil watch`."""
    parser = commands.add_parser(
        "watch",
        help="TensorBoard on runs: curves, images with maps, options beside metrics",
        description="Start TensorBoard on runs, each by the name of its folder, until Ctrl-C. Runs that begin later "
        "beneath a named folder appear by themselves.",
        examples=("msmil watch runs", "msmil watch runs/demo runs/other --port 6007"),
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="RUN", help="run folder, or a folder in which runs lie (required)")
    add("--port", type=_port, metavar="N", help="port (default: 6006, or the next one that is free)")
    add("--host", default="localhost", help="address to listen on; 0.0.0.0 lets others in (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    folders = [Path(folder) for folder in args.folders]
    runs = find_runs(folders)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="msmil_watch_") as name, contextlib.suppress(KeyboardInterrupt):
        links = Path(name)
        link(links, runs)
        url = _start(links, args.host, args.port, runs=len(runs))
        print(
            f"TensorBoard shows {len(runs)} {'run' if len(runs) == 1 else 'runs'} at {url} (Ctrl-C ends it)", flush=True
        )
        while True:
            time.sleep(_RESCAN_S)
            with contextlib.suppress(UserError):  # a folder that has gone: TensorBoard shows what it has read
                link(links, find_runs(folders))
    return 0


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """{name: run folder} of the runs that have begun, in and beneath the folders.

    A run is named by its path from the folder in which it was found, or by its own folder where that is the named one;
    where two would have one name, by as much more of their paths as tells them apart.

    Raises:
        UserError: a folder is missing, or has no run in it.
    """
    found: dict[Path, int] = {}  # how many of a path's last parts make its name
    for folder in folders:
        if not folder.is_dir():
            raise UserError("no such folder", file=folder, fix="name a run folder, for example runs/demo")
        root = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links, whose names the user chose
        runs = list(_beneath(root, _DEPTH))
        if not runs:
            fix = "name the folder of a run that has begun (it holds tensorboard/), or one in which runs lie"
            raise UserError("there is no run in it", file=folder, fix=fix)
        for path in runs:
            found.setdefault(path, max(1, len(path.parts) - len(root.parts)))
    return _named({path: parts for path, parts in found.items() if found.keys().isdisjoint(path.parents)})


def _beneath(folder: Path, depth: int) -> Iterable[Path]:
    if (folder / "tensorboard").is_dir():
        yield folder
    elif depth:
        with contextlib.suppress(PermissionError):
            for child in sorted(folder.iterdir()):
                if child.is_dir():
                    yield from _beneath(child, depth - 1)


def _named(parts: dict[Path, int]) -> dict[str, Path]:
    """Names from the last parts of each path; more parts until none equals another, or leads to another."""
    while True:
        names = {path: Path(*path.parts[-count:]) for path, count in parts.items()}
        places: dict[Path, list[Path]] = {}
        for path, name in names.items():
            for place in (name, *name.parents[:-1]):
                places.setdefault(place, []).append(path)
        clashing = {path for name in names.values() if len(places[name]) > 1 for path in places[name]}
        if not clashing:
            return {str(name): path for path, name in names.items()}
        for path in clashing:
            parts[path] = min(parts[path] + 1, len(path.parts) - 1)


def link(links: Path, runs: Mapping[str, Path]) -> None:
    """Make `links` a tree of links to the runs' events: TensorBoard walks a folder, and names a run by its path."""
    for old in [path for path in links.rglob("*") if path.is_symlink()]:
        if str(old.relative_to(links)) not in runs:
            old.unlink()
    for name, path in runs.items():
        place = links / name
        if not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path / "tensorboard")


def _start(links: Path, host: str, port: int | None, *, runs: int) -> str:
    """Start TensorBoard in a thread of this process and return its address.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    from tensorboard import program

    fewest, most = _IMAGES
    images = max(fewest, min(most, _ALL_IMAGES // runs))
    options = {"logdir": str(links), "host": host, "port": port, "samples_per_plugin": {"images": images}}
    board = program.TensorBoard()
    board.configure(argv=("",), **options, window_title="msmil", reload_interval=5.0)
    said = io.StringIO()  # what TensorBoard says of its own ways of loading
    try:
        with contextlib.redirect_stderr(said):
            return str(board.launch())
    except program.TensorBoardPortInUseError:
        fix = "choose another --port, or leave it out: the next free one is taken"
        raise UserError(f"port {port} is taken", fix=fix) from None
    except (program.TensorBoardServerException, OSError) as error:
        fix = "choose another --host or --port"
        raise UserError(f"TensorBoard cannot listen on {host} ({_words(error)})", fix=fix) from None


def _words(error: Exception) -> str:
    return str(getattr(error, "msg", None) or getattr(error, "strerror", None) or error)


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return number
