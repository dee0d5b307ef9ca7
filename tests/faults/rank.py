"""The program of a rank in a world with faults: launch.train, whose places are marked and in which a fault is caused.

python -m tests.faults.rank '{"folder": ..., "program": "rank", "fault": ..., "peer_wait_s": ...}' CONFIG [OVERRIDE ...]

With "program": "msmil" it is the command line, as it is.

A decoding process imports this file again, as it does with every program that starts it: it imports nothing itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Set up what the test asked for, then train."""
    import importlib

    import launch.ranks
    from launch.cli import main as msmil
    from launch.train import rank_main
    from tests.faults.places import mark_places

    settings = json.loads(sys.argv[1])
    if settings["program"] == "msmil":
        return msmil(sys.argv[2:])
    rank = int(os.environ["RANK"])
    folder = Path(settings["folder"])
    launch.ranks._PEER_WAIT_S = settings["peer_wait_s"]
    mark_places(folder / f"rank_{rank}.place")
    if fault := settings["fault"]:
        module, _, name = fault.partition(":")
        getattr(importlib.import_module(module), name)(rank, folder)
    return rank_main(sys.argv[2:])


if __name__ == "__main__":
    file = Path(json.loads(sys.argv[1])["folder"]) / f"rank_{os.environ.get('RANK', '0')}.txt"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main())
