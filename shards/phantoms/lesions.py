"""Masses and clusters of microcalcifications, with the boxes a reader would draw. H W pixels."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shards.phantoms.anatomy import Anatomy
from shards.phantoms.canvas import FIELD_HEIGHT_MM, Canvas, Float, add_spots
from shards.phantoms.exam import CALCIFICATION, MASS, BreastPlan, MassPlan
from shards.types import Box

# microcalcifications, inside clusters and scattered alike: sigma in mm, added intensity
SPOT_SIGMA_MM: Final = (0.18, 0.40)
SPOT_AMPLITUDE: Final = (0.25, 0.55)
CLUSTER_MARGIN_MM: Final = 1.5
VISIBLE: Final = 0.2  # share of a mass's contrast above which it belongs to the box


def draw_lesions(
    rng: np.random.Generator, plan: BreastPlan, anatomy: Anatomy, canvas: Canvas
) -> tuple[Float, list[Box]]:
    """A layer [H, W] with the lesions of one view, and their boxes in pixels; the chest wall is at the left."""
    layer_HW, boxes, taken = canvas.zeros(), [], np.zeros((0, 3))
    for mass in plan.masses:
        radius_mm = min(mass.diameter_mm, 0.5 * anatomy.depth_mm) / 2
        x, y = _place(rng, anatomy, canvas, mass.share, radius_mm, taken)
        taken = np.vstack([taken, (x, y, radius_mm)])
        boxes.append(_draw_mass(rng, mass, (x, y), radius_mm, layer_HW, canvas))
    for cluster in plan.clusters:
        radius_mm = min(cluster.diameter_mm, 0.5 * anatomy.depth_mm) / 2
        x, y = _place(rng, anatomy, canvas, cluster.share, radius_mm, taken)
        taken = np.vstack([taken, (x, y, radius_mm)])
        boxes.append(_draw_cluster(rng, cluster.spots, (x, y), radius_mm, layer_HW, canvas))
    return layer_HW, boxes


def _place(
    rng: np.random.Generator,
    anatomy: Anatomy,
    canvas: Canvas,
    share: float,
    radius_mm: float,
    taken: NDArray[np.float64],
) -> tuple[float, float]:
    """A point at about the wanted share of the depth, inside the breast, off the muscle and off other lesions."""
    x, y = rng.uniform(0, anatomy.depth_mm, 400), rng.uniform(0, FIELD_HEIGHT_MM, 400)
    apart = [np.hypot(x - cx, y - cy) - radius - radius_mm for cx, cy, radius in taken]
    room = np.min([anatomy.room_mm(x, y, canvas) - 0.7 * radius_mm - 2, *apart], axis=0)
    off = np.abs(x / anatomy.depth_mm - share)
    best = int(np.argmin(np.where(room >= 0, off, 10 - room)))
    return float(x[best]), float(y[best])


def _draw_mass(
    rng: np.random.Generator,
    mass: MassPlan,
    at_mm: tuple[float, float],
    radius_mm: float,
    layer_HW: Float,
    canvas: Canvas,
) -> Box:
    window, dx, dy = canvas.window(*at_mm, 1.5 * radius_mm)
    turn, ratio = rng.uniform(0, np.pi), rng.uniform(0.75, 1)
    along = (dx * np.cos(turn) + dy * np.sin(turn)).astype(np.float32)
    across = ((dy * np.cos(turn) - dx * np.sin(turn)) / ratio).astype(np.float32)
    distance, angle = np.hypot(along, across) / np.float32(radius_mm), np.arctan2(across, along)
    wave = {"round": 0.02, "lobulated": 0.11, "spiculated": 0.05}[mass.margin]
    lobes = sum(
        np.float32(rng.normal(0, wave)) * np.sin(k * angle + np.float32(rng.uniform(0, 2 * np.pi)))
        for k in (2, 3, 4, 5)
    )
    core = {"round": 0.86, "lobulated": 0.84, "spiculated": 0.55}[mass.margin]
    edge = {"round": 4.0, "lobulated": 4.0, "spiculated": 2.2}[mass.margin]
    profile = np.exp(-((distance / (core * (1 + lobes))) ** np.float32(edge)))
    if mass.margin == "spiculated":
        profile = np.maximum(profile, _spicules(rng, distance, angle, radius_mm))
    layer_HW[window] += np.float32(mass.contrast * rng.uniform(0.92, 1.08)) * profile
    return _box_of(profile > VISIBLE, window, MASS)


def _spicules(rng: np.random.Generator, distance: Float, angle: Float, radius_mm: float) -> Float:
    """Fine lines from the core outwards, each fading at its own length; distance is in radii."""
    rays = np.zeros_like(distance)
    count = int(rng.integers(9, 17))
    for k in range(count):
        direction = np.float32(2 * np.pi * (k + rng.uniform(-0.4, 0.4)) / count - np.pi)
        swing = np.abs(np.mod(angle - direction + np.float32(np.pi), np.float32(2 * np.pi)) - np.float32(np.pi))
        width = np.float32(max(0.5, 0.05 * radius_mm) / radius_mm)
        reach = np.float32(rng.uniform(0.8, 1.25))
        ray = np.exp(-np.square(swing * distance / width)) * np.clip((reach - distance) * 2, 0, 0.75)
        rays = np.maximum(rays, np.where(swing < np.pi / 2, ray, 0))
    return rays


def _draw_cluster(
    rng: np.random.Generator, spots: int, at_mm: tuple[float, float], radius_mm: float, layer_HW: Float, canvas: Canvas
) -> Box:
    distance = radius_mm * np.sqrt(rng.random(spots))
    angle = rng.uniform(0, 2 * np.pi, spots)
    turn, ratio = rng.uniform(0, np.pi), rng.uniform(0.6, 1)
    along, across = distance * np.cos(angle), ratio * distance * np.sin(angle)
    x = at_mm[0] + along * np.cos(turn) - across * np.sin(turn)
    y = at_mm[1] + along * np.sin(turn) + across * np.cos(turn)
    add_spots(layer_HW, canvas, x, y, rng.uniform(*SPOT_SIGMA_MM, spots), rng.uniform(*SPOT_AMPLITUDE, spots))
    low = (np.array([x.min(), y.min()]) - CLUSTER_MARGIN_MM) * canvas.px_per_mm
    high = (np.array([x.max(), y.max()]) + CLUSTER_MARGIN_MM) * canvas.px_per_mm
    return Box(
        CALCIFICATION,
        float(max(low[0], 0)),
        float(max(low[1], 0)),
        float(min(high[0], canvas.width_px)),
        float(min(high[1], canvas.height_px)),
    )


def _box_of(visible_HW: NDArray[np.bool_], window: tuple[slice, slice], label: str) -> Box:
    rows, columns = np.flatnonzero(visible_HW.any(axis=1)), np.flatnonzero(visible_HW.any(axis=0))
    top, left = window[0].start, window[1].start
    return Box(
        label, float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1)
    )
