"""What is no lesion is on every phantom, whatever its label: no kind of it tells of a label, and none is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

from shards.phantoms import distractors, draw
from shards.phantoms.canvas import Canvas, Line
from shards.phantoms.draw import Phantom, draw_phantom
from shards.phantoms.exam import VIEWS, BreastPlan, plan_breast

SMALL = Canvas(192, 120)
SEED = 5
EXAMS = range(6)
Patch = pytest.MonkeyPatch


def phantoms() -> list[Phantom]:
    return [draw_phantom(SEED, exam, "R", view, SMALL) for exam in EXAMS for view in VIEWS]


@pytest.fixture(scope="module")
def drawn() -> list[Phantom]:
    """Phantoms with lesions and without."""
    found = phantoms()
    assert {bool(phantom.boxes) for phantom in found} == {True, False}
    return found


def without_lines(patch: Patch, name: str) -> None:
    """The same random numbers, and lines that are black."""
    lines: Callable[..., list[Line]] = getattr(distractors, name)
    patch.setattr(distractors, name, lambda *given: [replace(line, level=0.0) for line in lines(*given)])


def without_spots(patch: Patch, name: str) -> None:
    """The same random numbers, drawn where nobody sees it."""
    spots: Callable[..., None] = getattr(distractors, name)
    patch.setattr(distractors, name, lambda rng, anatomy, canvas, _: spots(rng, anatomy, canvas, canvas.zeros()))


def without_ink(patch: Patch, name: str) -> None:
    patch.setattr(ImageDraw.ImageDraw, name, lambda *_, **__: None)


KINDS: dict[str, tuple[Callable[[Patch, str], None], str]] = {
    "vessels": (without_lines, "_vessel"),
    "linear scars": (without_lines, "_scar"),
    "lymph nodes": (without_spots, "_lymph_node"),
    "scattered single calcifications": (without_spots, "_single_calcifications"),
    "bright spots": (without_spots, "_bright_spots"),
    "corner label": (without_ink, "text"),
    "marker block": (without_ink, "rectangle"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_distractor_is_seen_on_every_phantom(kind: str, drawn: list[Phantom], monkeypatch: Patch) -> None:
    """Nothing but that kind is taken away: where the picture stays what it was, it had not been drawn."""
    take_away, name = KINDS[kind]
    take_away(monkeypatch, name)
    for whole, less in zip(drawn, phantoms(), strict=True):
        brighter_HW = whole.image_HW.astype(int) - less.image_HW
        lesions = sorted({box.label for box in whole.boxes}) or "no lesion"
        assert np.sum(brighter_HW >= 10) >= 5, f"no {kind} on a phantom with {lesions}"


def test_an_exam_has_the_same_distractors_with_its_lesions_and_without(monkeypatch: Patch) -> None:
    layers: list[np.ndarray] = []
    draw_distractors = draw.draw_distractors

    def kept(*given: Any) -> np.ndarray:
        layers.append(draw_distractors(*given))
        return layers[-1]

    def healthy(*given: Any) -> BreastPlan:
        return replace(plan_breast(*given), masses=(), clusters=())

    monkeypatch.setattr(draw, "draw_distractors", kept)
    with_lesions = phantoms()
    monkeypatch.setattr(draw, "plan_breast", healthy)
    assert not any(phantom.boxes for phantom in phantoms())
    count = len(with_lesions)
    assert len(layers) == 2 * count
    for before, after in zip(layers[:count], layers[count:], strict=True):
        assert np.array_equal(before, after)
