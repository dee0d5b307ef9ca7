"""Legs of small runs, trained in real worlds, and what they wrote down (tests.distributed.legs)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.experiments import write_tiny
from tests.worlds import world

DEADLINE_S = 240
# Most of the first 20 gradients are longer. Not 1: from step 12 on, rounding then moves the norms by 1e-3, even between
# one rank that accumulates and one that does not; in float64 it does not.
CLIP = 1.5
_OF_LEGS = ("dtype", "threshold", "validates", "predict", "refused", "scale")


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Words of the train section."""
    return {"engine": "deepspeed", "zero_stage": stage, **more}


@dataclass(frozen=True)
class Told:
    """What a leg wrote: the losses of its steps, and (row, digest of the pixels) of the samples that each received.

    norms: of the gradient of each step before it is clipped; micro_batches: for each step, how many images each
    micro-batch of rank 0 held.
    seen: samples of weight 1 that the run has counted; predictions: see legs.predict_all.
    due: for each rank, the steps behind which it saw that a checkpoint is due by the clock. skipped: steps that
    changed nothing, since fp16 overflowed; warned: what DeepSpeed warned of on rank 0.
    """

    world: int
    start: int
    losses: list[float]
    norms: list[float]
    micro_batches: list[list[int]]
    samples: list[list[list[Any]]]
    due: list[list[int]]
    gradients: dict[str, Tensor]
    seen: int
    skipped: int
    warned: list[str]
    predictions: dict[str, Any] = field(default_factory=dict)

    def agrees_with(self, one: Told, *, bound: float) -> None:
        """Fail unless it trained as another leg did in its first steps: the same samples; to a relative bound, losses,
        the first gradients of all parameters, and the norms of all gradients.
        """
        steps = len(self.losses)
        assert self.samples == one.samples[:steps]
        assert self.losses == pytest.approx(one.losses[:steps], rel=bound)
        assert self.norms == pytest.approx(one.norms[:steps], rel=bound)
        assert self.gradients.keys() == one.gradients.keys()
        for key, gradient in one.gradients.items():
            difference = (self.gradients[key] - gradient).norm()
            if key.endswith("score.bias"):  # softmax does not feel it: its gradient is rounding noise around 0
                assert max(difference, gradient.norm()) < 1e-7
            else:
                assert gradient.norm() > 1e-7, f"{key} has no gradient to compare"
                assert difference <= bound * gradient.norm(), f"{key}: {difference / gradient.norm():.1e}"


class Runs:
    """Runs in one folder, all of one small experiment: BatchNorm frozen, gradients clipped, augmentation that changes
    pixels.
    """

    def __init__(self, folder: Path, packed: Path) -> None:
        self.folder, self.packed = folder, packed

    def leg(self, name: str, until: int, *, run: str | None = None, **settings: Any) -> dict[str, Any]:
        """A leg called `name` of the run `run` up to a step.

        Settings: words of the sections train, model, optim, data, checkpoint, evaluate and tracking; augment, in place
        of the augmentation; dtype, threshold, validates, predict, refused, scale (see legs.py).
        """
        folder = self.folder / name
        folder.mkdir()
        backbone = {"backbone_options": {"channels": [8, 8, 16, 16], "stem_width": 8, "zero_init_last": False}}
        config = write_tiny(
            folder,
            self.packed,
            name=run or name,
            output_dir=str(self.folder / "runs"),
            seed=5,  # no tensor's first gradient is so small that its own rounding is larger than the bounds
            # contiguous: DeepSpeed's buffers are, and another memory format sums a convolution in another order
            train={"epochs": 8, "batch_size": 6, "channels_last": False} | settings.get("train", {}),
            optim={"clip_grad_norm": CLIP} | settings.get("optim", {}),
            loss={"instance_weight": 1.0, "composite_weight": 1.0},
            model=backbone | settings.get("model", {}),
            data=settings.get("data", {}),
            checkpoint=settings.get("checkpoint", {}),
            evaluate=settings.get("evaluate", {}),
            tracking=settings.get("tracking", {}),
            bags={"augment": settings.get("augment", {"rotation_deg": 5, "gain": 0.2, "noise_sd": 0.02})},
        )
        more = {key: settings[key] for key in _OF_LEGS if key in settings}
        return {"config": str(config), "until": until, "out": str(self._out(name)), **more}

    def train(self, ranks: int, legs: Sequence[dict[str, Any]]) -> None:
        """Train legs one after another in one world."""
        file = self.folder / f"legs_{ranks}.json"
        file.write_text(json.dumps(legs))
        world("tests.distributed.rank", [str(file)], ranks=ranks, deadline_s=DEADLINE_S)

    def told(self, name: str) -> Told:
        """What a leg wrote."""
        gradients = torch.load(f"{self._out(name)}.gradients", weights_only=True)
        return Told(gradients=gradients, **json.loads(self._out(name).read_text()))

    def refusals(self, name: str) -> list[str]:
        """What each rank was told when it opened the run of a leg."""
        told: list[str] = json.loads(self._out(name).read_text())
        return told

    def saved(self, run: str, step: int) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: weights, moments, averaged weights."""
        folder = self.folder / "runs" / run / "checkpoints" / f"step_{step:08d}"
        return {f"{file.stem}/{key}": x for file in folder.glob("*.safetensors") for key, x in load_file(file).items()}

    def _out(self, name: str) -> Path:
        return self.folder / f"{name}.json"
