"""What is true of a phantom exam before anything is drawn: identifiers, labels, lesions, tissue, scanner.

Every draw is a function of (seed, exam index, side, view) and not of the image size, so that an exam has the same
findings in the same places at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from shards.phantoms.anatomy import BreastShape
from shards.types import Laterality, View

MASS: Final = "Mass"
CALCIFICATION: Final = "Suspicious Calcification"
LABELS: Final = (MASS, CALCIFICATION)
SIDES: Final[tuple[Laterality, ...]] = ("L", "R")
VIEWS: Final[tuple[View, ...]] = ("CC", "MLO")
SCANNERS: Final = ("SIEMENS", "Planmed", "IMS s.r.l.", "IMS GIOTTO S.p.A.")

# Of every 22 breasts in a row (11 exams) 6 have the label, 27 %: even a small archive has positives, and the labels
# stay independent of each other.
BLOCK_BREASTS: Final = 22
BLOCK_POSITIVES: Final = 6

Margin = Literal["round", "lobulated", "spiculated"]
Purpose = Literal["labels", "exam", "breast", "outline", "tissue", "lesions", "distractors", "scanner"]
_PURPOSES: Final[tuple[Purpose, ...]] = (
    "labels",
    "exam",
    "breast",
    "outline",
    "tissue",
    "lesions",
    "distractors",
    "scanner",
)


@dataclass(frozen=True)
class MassPlan:
    """A mass: largest diameter in mm, added intensity (0..1), and its depth as a share of chest wall to nipple."""

    margin: Margin
    diameter_mm: float
    contrast: float
    share: float


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster of microcalcifications in a disc of a diameter in mm, at a depth as for a mass."""

    spots: int
    diameter_mm: float
    share: float


@dataclass(frozen=True)
class BreastPlan:
    """One breast of an exam; its views share everything here."""

    exam_id: str
    laterality: Laterality
    scanner: str
    shape: BreastShape
    birads: str
    labels: dict[str, bool]
    masses: tuple[MassPlan, ...]
    clusters: tuple[ClusterPlan, ...]


def stream(seed: int, purpose: Purpose, *path: int) -> np.random.Generator:
    """The generator of one purpose at one place; no draw elsewhere moves it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *path)))


def _hash(*path: object) -> str:
    return hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=16).hexdigest()


def exam_id(seed: int, exam: int) -> str:
    """32 hex digits, like the identifiers of VinDr-Mammo."""
    return _hash("exam", seed, exam)


def image_id(seed: int, exam: int, laterality: Laterality, view: View) -> str:
    """32 hex digits, like the identifiers of VinDr-Mammo, without a suffix."""
    return _hash("image", seed, exam, laterality, view)


def _labels(seed: int, exam: int, side: int) -> dict[str, bool]:
    block, place = divmod(2 * exam + side, BLOCK_BREASTS)
    return {
        name: bool(stream(seed, "labels", block, k).permutation(BLOCK_BREASTS)[place] < BLOCK_POSITIVES)
        for k, name in enumerate(LABELS)
    }


def _mass(rng: np.random.Generator) -> MassPlan:
    margins: tuple[Margin, ...] = ("round", "lobulated", "spiculated")
    return MassPlan(
        margin=margins[rng.integers(3)],
        diameter_mm=float(np.exp(rng.triangular(np.log(6), np.log(28), np.log(40)))),
        contrast=rng.uniform(0.30, 0.48),
        share=rng.uniform(0.15, 0.85),
    )


def plan_breast(seed: int, exam: int, laterality: Laterality) -> BreastPlan:
    """What the two views of a breast share. The scanner and the density class are the exam's."""
    side = SIDES.index(laterality)
    of_exam, rng = stream(seed, "exam", exam), stream(seed, "breast", exam, side)
    scanner = SCANNERS[of_exam.integers(len(SCANNERS))]
    density = "ABCD"[of_exam.choice(4, p=(0.15, 0.3, 0.35, 0.2))]
    depth_mm, stature = of_exam.uniform(72, 108), of_exam.uniform(0.9, 1.03)
    shape = BreastShape(depth_mm=depth_mm + rng.normal(0, 3), stature=stature, density=density)
    labels = _labels(seed, exam, side)
    masses = [_mass(rng) for _ in range(1 + (rng.random() < 0.15))]
    clusters = [
        ClusterPlan(int(rng.integers(10, 31)), rng.uniform(7, 20), rng.uniform(0.15, 0.85))
        for _ in range(1 + (rng.random() < 0.1))
    ]
    suspicious = any(labels.values())
    grades = ("BI-RADS 3", "BI-RADS 4", "BI-RADS 5") if suspicious else ("BI-RADS 1", "BI-RADS 2")
    return BreastPlan(
        exam_id=exam_id(seed, exam),
        laterality=laterality,
        scanner=scanner,
        shape=shape,
        birads=grades[rng.integers(len(grades))],
        labels=labels,
        masses=tuple(masses) if labels[MASS] else (),
        clusters=tuple(clusters) if labels[CALCIFICATION] else (),
    )
