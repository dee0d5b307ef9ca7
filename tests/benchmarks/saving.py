"""What a save costs the training: `python -m tests.benchmarks.saving`.

A loop of steps that only compute saves a checkpoint of the size of a recipe's, in line and beside (`Saver`), in turns,
and prints how much longer the loop took than without saving, per save.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from msmil.engine.checkpoint import Snapshot, host_copy, save_checkpoint
from msmil.engine.runtime import gpu_in_use
from msmil.engine.saving import Saver
from msmil.types import TrainState
from shards.files import human_bytes

WORDS = {"in line": False, "beside": True}


class Loop:
    """Steps of about `step_s` seconds of matrix products, with saves between them."""

    def __init__(self, folder: Path, *, megabytes: float, steps: int, every: int, step_s: float) -> None:
        self.device = torch.device("cuda" if gpu_in_use() else "cpu")
        self.folder, self.steps, self.every = folder, steps, every
        count = int(megabytes * 1e6 / 4 / 3)
        self.weights = {"w": torch.rand(count, device=self.device)}
        self.moments = {f"w/{key}": torch.rand(count, device=self.device) for key in ("exp_avg", "exp_avg_sq")}
        self._a = torch.rand(1024, 1024, device=self.device)
        self._products = 1
        self._products = max(1, round(step_s / min(self._step_s() for _ in range(5))))

    def seconds(self, *, saving: bool, beside: bool) -> float:
        """Seconds of the loop, until everything is written."""
        saver, start_s = Saver(every_minutes=0), time.perf_counter()
        for step in range(1, self.steps + 1):
            self._step_s()
            if saving and step % self.every == 0:
                saver.wait()
                state = TrainState(step, 0, step, step, None, None, "")
                copies = {"model": host_copy(self.weights), "optimizer": host_copy(self.moments)}
                content = Snapshot(**copies, ema=None, state=state, loss_scale=None, config_yaml="")
                saver.begin(lambda content=content: save_checkpoint(self.folder, content))
                if not beside:
                    saver.wait()
        saver.wait()
        return time.perf_counter() - start_s

    def _step_s(self) -> float:
        start_s = time.perf_counter()
        for _ in range(self._products):
            self._a @ self._a
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start_s


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print, and return, the seconds that a save costs each way."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.saving", description=__doc__)
    add = parser.add_argument
    add("--megabytes", type=float, default=130, help="of weights and moments (default: FPN-AbMIL's)")
    add("--steps", type=int, default=20, help="steps of a loop")
    add("--every", type=int, default=10, help="steps between saves")
    add("--step-s", type=float, default=0.5, help="seconds of a step")
    add("--rounds", type=int, default=3, help="loops of each kind, in turns; the fastest counts")
    add("--folder", type=Path, help="where to write (default: the system's folder for temporary files)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        loop = Loop(folder, megabytes=args.megabytes, steps=args.steps, every=args.every, step_s=args.step_s)
        kinds = {"without": (False, False)} | {name: (True, beside) for name, beside in WORDS.items()}
        fastest = dict.fromkeys(kinds, float("inf"))
        for _ in range(args.rounds):
            for name, (saving, beside) in kinds.items():
                fastest[name] = min(fastest[name], loop.seconds(saving=saving, beside=beside))
    finally:
        shutil.rmtree(folder)
    saves = args.steps // args.every
    cost = {name: (fastest[name] - fastest["without"]) / saves for name in WORDS}
    print(f"{human_bytes(int(args.megabytes * 1e6))} on {loop.device}, a step {fastest['without'] / args.steps:.2f} s")
    for name, seconds in cost.items():
        print(f"a save {name}: {seconds:.2f} s of the loop")
    print(f"beside / in line: {cost['beside'] / cost['in line']:.2f}")
    return cost


if __name__ == "__main__":
    main()
