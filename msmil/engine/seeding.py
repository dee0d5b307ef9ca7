"""Every random draw is a function of where the run stands, so that no generator state has to be saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that is a fixed function of the given whole numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch (all devices): initial weights, and anything that draws at start."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # libraries draw from the global state
    torch.manual_seed(seed)


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make dropout and drop-path of one forward pass a function of (seed, step, micro-step, rank)."""
    torch.manual_seed(derive_seed(seed, 1, step, micro_step, rank))
