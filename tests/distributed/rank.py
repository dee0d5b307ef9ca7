"""The program of a rank that trains legs: python -m tests.distributed.rank FILE (see tests.distributed.legs).

A decoding process imports the main module again, and legs.py imports all that trains: this file imports nothing itself.
"""

from __future__ import annotations

import sys


def main() -> None:
    from tests.distributed.legs import main as train_legs

    train_legs(sys.argv[1])


if __name__ == "__main__":
    main()
