"""What every phantom shows, whatever its label, and what a reader must not take for a lesion. H W pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.phantoms.anatomy import Anatomy
from shards.phantoms.canvas import FIELD_HEIGHT_MM, Canvas, Float, Line, add_spots, draw_lines
from shards.phantoms.lesions import SPOT_AMPLITUDE, SPOT_SIGMA_MM

Points = NDArray[np.float64]


def draw_distractors(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas) -> Float:
    """A layer [H, W] with vessels, scars, lymph nodes, dense islands, scattered calcifications and bright spots."""
    vessels = [_vessel(rng, anatomy) for _ in range(rng.integers(3, 8))]
    scars = [_scar(rng, anatomy, canvas) for _ in range(rng.integers(1, 4))]
    lines = [line for group in (*vessels, *scars) for line in group]
    layer_HW = draw_lines(canvas, lines, full_scale=0.3)
    for _ in range(rng.integers(0, 2)):
        _island(rng, anatomy, canvas, layer_HW)
    for _ in range(rng.integers(1, 3)):
        _lymph_node(rng, anatomy, canvas, layer_HW)
    _single_calcifications(rng, anatomy, canvas, layer_HW)
    _bright_spots(rng, anatomy, canvas, layer_HW)
    if rng.random() < 0.1:
        _vascular_calcification(rng, vessels[0][0].points_mm, canvas, layer_HW)
    return layer_HW


def _points(
    rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas, count: int, room_mm: float, apart_mm: float = 0
) -> Points:
    """Up to `count` points (x, y) in the breast and off the muscle, no two closer than `apart_mm`; at least one."""
    x, y = rng.uniform(0, anatomy.depth_mm, 6 * count + 60), rng.uniform(0, FIELD_HEIGHT_MM, 6 * count + 60)
    room = anatomy.room_mm(x, y, canvas)
    fit = room >= min(room_mm, float(room.max()))
    candidates = np.stack([x, y], axis=1)[fit]
    kept = candidates[:1]
    for point in candidates[1:]:
        if len(kept) == count:
            break
        if np.min(np.hypot(*(kept - point).T)) >= apart_mm:
            kept = np.vstack([kept, point])
    return kept


def _vessel(rng: np.random.Generator, anatomy: Anatomy) -> list[Line]:
    """A curve that runs forward, thinner as it goes."""
    steps, step_mm = 28, rng.uniform(2.2, 4.0)
    heading = rng.uniform(-0.9, 0.9) + np.cumsum(rng.normal(0, 0.14, steps)) + np.cumsum(rng.normal(0, 0.015, steps))
    start = np.array([rng.uniform(-5, 0.5 * anatomy.depth_mm), rng.uniform(0.1, 0.9) * FIELD_HEIGHT_MM])
    path = start + np.cumsum(step_mm * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    width_mm, level = rng.uniform(0.8, 1.9), rng.uniform(0.06, 0.16)
    parts = ((path[:11], 1.0), (path[10:20], 0.75), (path[19:], 0.5))
    return [Line(part, width_mm * share, level) for part, share in parts]


def _scar(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas) -> list[Line]:
    """A nearly straight, dense line with faint ends."""
    centre = _points(rng, anatomy, canvas, 1, 8)[0]
    angle, length_mm, bow_mm = rng.uniform(0, np.pi), rng.uniform(12, 38), rng.normal(0, 1.5)
    t = np.linspace(-0.5, 0.5, 9)
    along, across = t * length_mm, bow_mm * (1 - 4 * t**2)
    x = centre[0] + along * np.cos(angle) - across * np.sin(angle)
    y = centre[1] + along * np.sin(angle) + across * np.cos(angle)
    path, width_mm, level = np.stack([x, y], axis=1), rng.uniform(0.6, 1.5), rng.uniform(0.1, 0.26)
    parts = ((path[:3], 0.4), (path[-3:], 0.4), (path[2:4], 0.75), (path[-4:-2], 0.75), (path[3:-3], 1.0))
    return [Line(part, width_mm * (0.5 + 0.5 * share), level * share) for part, share in parts]


def _island(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas, layer_HW: Float) -> None:
    """Glandular tissue apart from the rest: as large as a mass, but a cloud without an edge."""
    centre, size_mm = _points(rng, anatomy, canvas, 1, 10)[0], rng.uniform(4, 10)
    count = int(rng.integers(4, 9))
    x, y = centre[0] + rng.normal(0, size_mm, count), centre[1] + rng.normal(0, size_mm, count)
    add_spots(layer_HW, canvas, x, y, rng.uniform(0.3, 0.8, count) * size_mm, rng.uniform(0.02, 0.06, count))


def _lymph_node(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas, layer_HW: Float) -> None:
    """A smooth bean with a fatty hilum, in the axilla on MLO, anywhere on CC."""
    if anatomy.view == "MLO":
        x, y = rng.uniform(4, 0.5 * anatomy.depth_mm), rng.uniform(4, 70)
    else:
        x, y = _points(rng, anatomy, canvas, 1, 6)[0]
    radius_mm, ratio, turn = rng.uniform(3.5, 7.5), rng.uniform(0.5, 0.8), rng.uniform(0, np.pi)
    window, dx, dy = canvas.window(x, y, 1.6 * radius_mm)
    along = (dx * np.cos(turn) + dy * np.sin(turn)) / radius_mm
    across = (dy * np.cos(turn) - dx * np.sin(turn)) / (radius_mm * ratio)
    body = np.exp(-(np.hypot(along, across) ** 5))
    hilum = np.exp(-(np.hypot(along / 0.6, (across - rng.uniform(0.25, 0.5)) / 0.55) ** 2))
    node = rng.uniform(0.16, 0.32) * body * (1 - rng.uniform(0.85, 1.0) * hilum)
    layer_HW[window] += node.astype(np.float32)


def _single_calcifications(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas, layer_HW: Float) -> None:
    """Of the same make as those in clusters, scattered."""
    single = _points(rng, anatomy, canvas, int(rng.integers(4, 17)), 2, apart_mm=7)
    n = len(single)
    add_spots(
        layer_HW, canvas, single[:, 0], single[:, 1], rng.uniform(*SPOT_SIGMA_MM, n), rng.uniform(*SPOT_AMPLITUDE, n)
    )


def _bright_spots(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas, layer_HW: Float) -> None:
    """Coarse calcifications, brighter than any lesion."""
    coarse = _points(rng, anatomy, canvas, int(rng.integers(1, 5)), 3)
    n = len(coarse)
    add_spots(layer_HW, canvas, coarse[:, 0], coarse[:, 1], rng.uniform(0.5, 1.6, n), rng.uniform(0.95, 1.4, n))


def _vascular_calcification(rng: np.random.Generator, path_mm: Points, canvas: Canvas, layer_HW: Float) -> None:
    """Specks in a row along the wall of a vessel."""
    count = int(rng.integers(5, 11))
    t = np.sort(rng.uniform(0, len(path_mm) - 1, count))
    x, y = (np.interp(t, np.arange(len(path_mm)), path_mm[:, k]) + rng.normal(0, 0.5, count) for k in (0, 1))
    add_spots(layer_HW, canvas, x, y, rng.uniform(*SPOT_SIGMA_MM, count), rng.uniform(*SPOT_AMPLITUDE, count))
