"""From a plan to a picture: one phantom, a pure function of (seed, exam, side, view) and the size. H W pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.phantoms.anatomy import Anatomy, draw_tissue, make_anatomy
from shards.phantoms.canvas import Canvas, Float
from shards.phantoms.distractors import draw_distractors
from shards.phantoms.exam import SIDES, VIEWS, BreastPlan, plan_breast, stream
from shards.phantoms.lesions import draw_lesions
from shards.phantoms.scanner import burn_in, expose
from shards.types import Box, Laterality, View


@dataclass(frozen=True)
class Phantom:
    """A drawn mammogram; boxes are in its pixels, breast_HW is True where tissue is seen (muscle included)."""

    image_HW: NDArray[np.uint8]
    boxes: tuple[Box, ...]
    breast_HW: NDArray[np.bool_]
    plan: BreastPlan


def draw_phantom(seed: int, exam: int, laterality: Laterality, view: View, canvas: Canvas) -> Phantom:
    """Draw one view. Left breasts have the chest wall at the left border; right ones are mirrored."""
    plan = plan_breast(seed, exam, laterality)
    place = (exam, SIDES.index(laterality), VIEWS.index(view))
    anatomy, lesions_HW, boxes = _lesions(seed, place, plan, view, canvas)
    tissue_HW, cover_HW = draw_tissue(stream(seed, "tissue", *place), anatomy, canvas)
    tissue_HW += lesions_HW * cover_HW
    tissue_HW += draw_distractors(stream(seed, "distractors", *place), anatomy, canvas) * cover_HW
    scanner = stream(seed, "scanner", *place)
    grey_HW = expose(scanner, tissue_HW, cover_HW, plan.scanner, canvas)
    breast_HW = cover_HW > 0.5
    if laterality == "R":
        grey_HW, breast_HW = grey_HW[:, ::-1], breast_HW[:, ::-1]
    image_HW, written_HW = burn_in(scanner, np.ascontiguousarray(grey_HW), laterality, view, canvas)
    return Phantom(image_HW, _as_shown(boxes, laterality, canvas), breast_HW & ~written_HW, plan)


def phantom_boxes(seed: int, exam: int, laterality: Laterality, view: View, canvas: Canvas) -> tuple[Box, ...]:
    """The boxes of `draw_phantom` without drawing the rest."""
    place = (exam, SIDES.index(laterality), VIEWS.index(view))
    _, _, boxes = _lesions(seed, place, plan_breast(seed, exam, laterality), view, canvas)
    return _as_shown(boxes, laterality, canvas)


def _lesions(
    seed: int, place: tuple[int, int, int], plan: BreastPlan, view: View, canvas: Canvas
) -> tuple[Anatomy, Float, list[Box]]:
    anatomy = make_anatomy(stream(seed, "outline", *place), plan.shape, view, canvas)
    layer_HW, boxes = draw_lesions(stream(seed, "lesions", *place), plan, anatomy, canvas)
    return anatomy, layer_HW, boxes


def _as_shown(boxes: list[Box], laterality: Laterality, canvas: Canvas) -> tuple[Box, ...]:
    if laterality == "L":
        return tuple(boxes)
    width = canvas.width_px
    return tuple(Box(box.label, width - box.x1, box.y0, width - box.x0, box.y1) for box in boxes)
