"""What a phantom shows, and what it depends on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from shards.phantoms.anatomy import draw_tissue, make_anatomy
from shards.phantoms.canvas import Canvas
from shards.phantoms.draw import Phantom, draw_phantom, phantom_boxes
from shards.phantoms.exam import LABELS, MASS, SIDES, VIEWS, exam_id, image_id, plan_breast, stream
from shards.phantoms.lesions import draw_lesions
from shards.phantoms.scanner import GREY_CURVES, expose
from shards.phantoms.texture import BETA, random_fields
from shards.types import Box, Laterality, View

pytestmark = pytest.mark.slow

DEMO = Canvas(384, 240)
SEED = 5


@pytest.fixture(scope="module")
def phantoms() -> list[tuple[Laterality, View, Phantom]]:
    return [(s, v, draw_phantom(SEED, exam, s, v, DEMO)) for exam in range(11) for s in SIDES for v in VIEWS]


def test_an_image_is_a_function_of_seed_exam_side_and_view() -> None:
    first = draw_phantom(SEED, 3, "R", "MLO", DEMO)
    draw_phantom(SEED, 4, "L", "CC", DEMO)
    again = draw_phantom(SEED, 3, "R", "MLO", Canvas(384, 240))
    assert again.image_HW.tobytes() == first.image_HW.tobytes()
    assert again.boxes == first.boxes
    others = [(SEED + 1, 3, "R", "MLO"), (SEED, 2, "R", "MLO"), (SEED, 3, "L", "MLO"), (SEED, 3, "R", "CC")]
    for seed, exam, side, view in others:
        other = draw_phantom(seed, exam, side, view, DEMO)  # type: ignore[arg-type]
        assert np.mean(other.image_HW != first.image_HW) > 0.2


def test_identifiers_are_hashes_and_never_repeat() -> None:
    images = [image_id(seed, exam, s, v) for seed in (0, 1) for exam in range(50) for s in SIDES for v in VIEWS]
    exams = [exam_id(seed, exam) for seed in (0, 1) for exam in range(50)]
    names = {*images, *exams}
    assert len(names) == 500
    assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in names)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quarter_of_the_breasts_has_a_label_whatever_the_other_label(seed: int) -> None:
    positive = np.array([list(plan_breast(seed, e, s).labels.values()) for e in range(220) for s in SIDES])
    assert np.all((positive.mean(axis=0) > 0.22) & (positive.mean(axis=0) < 0.32))
    assert abs(np.corrcoef(positive.T)[0, 1]) < 0.15
    # nothing but the labels themselves tells of a label: neither side, nor scanner, nor density class
    sides = np.tile([0, 1], 220)
    assert abs(np.corrcoef(positive[:, 0], sides)[0, 1]) < 0.15


def test_both_views_of_a_breast_show_what_its_labels_say(phantoms: list[tuple[Laterality, View, Phantom]]) -> None:
    shown = set()
    for _, _, phantom in phantoms:
        plan = phantom.plan
        assert {box.label for box in phantom.boxes} == {label for label in LABELS if plan.labels[label]}
        assert len(phantom.boxes) == len(plan.masses) + len(plan.clusters)
        shown |= {box.label for box in phantom.boxes}
    assert shown == set(LABELS)


@pytest.mark.parametrize("exam", range(4))
@pytest.mark.parametrize("view", VIEWS)
def test_findings_have_the_same_place_and_extent_in_mm_at_any_size(exam: int, view: View) -> None:
    for side in SIDES:
        small, large = (phantom_boxes(SEED, exam, side, view, c) for c in (DEMO, Canvas(1536, 960)))
        assert [box.label for box in small] == [box.label for box in large]
        for a, b in zip(small, large, strict=True):
            assert (a.x0, a.y0, a.x1, a.y1) == pytest.approx((b.x0 / 4, b.y0 / 4, b.x1 / 4, b.y1 / 4), abs=1.5)


@pytest.mark.parametrize("size", [(64, 64), (127, 255), (384, 240), (1000, 200), (1520, 912)])
def test_boxes_lie_on_the_breast_at_any_size_of_image(size: tuple[int, int]) -> None:
    canvas = Canvas(*size)
    exams = [exam for exam in range(8) if any(plan_breast(SEED, exam, "R").labels.values())][:2]
    for exam in exams:
        for view in VIEWS:
            phantom = draw_phantom(SEED, exam, "R", view, canvas)
            assert phantom.image_HW.shape == phantom.breast_HW.shape == size
            assert phantom.image_HW.dtype == np.uint8
            assert phantom.boxes == phantom_boxes(SEED, exam, "R", view, canvas)
            for box in phantom.boxes:
                assert 0 <= box.x0 < box.x1 <= size[1]
                assert 0 <= box.y0 < box.y1 <= size[0]
                assert inside(phantom.breast_HW, box).mean() > 0.6


def inside(array_HW: np.ndarray, box: Box) -> np.ndarray:
    return array_HW[int(box.y0) : int(np.ceil(box.y1)), int(box.x0) : int(np.ceil(box.x1))]


@pytest.mark.parametrize("label", LABELS)
def test_a_box_holds_its_lesion(label: str) -> None:
    """What is drawn lies in the boxes, but for the faint outer part of a mass, and fills them."""
    for exam in range(30):
        plan = plan_breast(SEED, exam, "L")
        if not plan.labels[label]:
            continue
        plan = replace(plan, **({"clusters": ()} if label == MASS else {"masses": ()}))
        anatomy = make_anatomy(stream(SEED, "outline", exam), plan.shape, "CC", DEMO)
        layer_HW, boxes = draw_lesions(stream(SEED, "lesions", exam), plan, anatomy, DEMO)
        in_boxes_HW = np.zeros(layer_HW.shape, dtype=bool)
        for box in boxes:
            inside(in_boxes_HW, box)[:] = True
            assert inside(layer_HW, box).max() > 0.15
            width_mm, height_mm = ((b - a) / DEMO.px_per_mm for a, b in ((box.x0, box.x1), (box.y0, box.y1)))
            assert max(width_mm, height_mm) > 5
            assert max(width_mm, height_mm) < 50
        assert layer_HW[in_boxes_HW].sum() > 0.9 * layer_HW.sum()


def test_a_left_breast_has_its_chest_wall_at_the_left(phantoms: list[tuple[Laterality, View, Phantom]]) -> None:
    for side, _, phantom in phantoms:
        wall = phantom.breast_HW if side == "L" else phantom.breast_HW[:, ::-1]
        assert wall[:, 0].mean() > 0.7
        assert wall[:, -1].mean() == 0
        assert 0.25 < wall.mean() < 0.75


def test_air_is_black_and_the_burned_in_label_and_marker_are_on_every_image(
    phantoms: list[tuple[Laterality, View, Phantom]],
) -> None:
    for side, _, phantom in phantoms:
        outside_HW = ~phantom.breast_HW
        far_HW = outside_HW[:, 190:] if side == "L" else outside_HW[:, :50]
        image_HW = phantom.image_HW[:, 190:] if side == "L" else phantom.image_HW[:, :50]
        assert np.median(image_HW[far_HW]) == 0
        assert image_HW[far_HW].max() == 255
        assert np.sum((image_HW >= 120) & far_HW) > 200


def test_every_breast_has_spots_brighter_than_any_lesion(phantoms: list[tuple[Laterality, View, Phantom]]) -> None:
    for _, _, phantom in phantoms:
        free_HW = phantom.breast_HW.copy()
        for box in phantom.boxes:
            inside(free_HW, box)[:] = False
        assert phantom.image_HW[free_HW].max() == 255


def test_mlo_views_show_the_pectoral_muscle_in_the_upper_corner(
    phantoms: list[tuple[Laterality, View, Phantom]],
) -> None:
    for side, view, phantom in phantoms:
        image_HW = phantom.image_HW if side == "L" else phantom.image_HW[:, ::-1]
        breast_HW = phantom.breast_HW if side == "L" else phantom.breast_HW[:, ::-1]
        if view == "MLO":
            assert np.median(image_HW[5:60, 5:30]) > 1.2 * np.median(image_HW[breast_HW])


def test_tissue_grows_denser_from_a_to_d() -> None:
    """In the same breast, the brightness in front of the muscle rises with the density class."""
    means = []
    for density in "ABCD":
        shape = replace(plan_breast(SEED, 0, "L").shape, density=density)
        anatomy = make_anatomy(stream(SEED, "outline", 0), shape, "CC", DEMO)
        tissue_HW, cover_HW = draw_tissue(stream(SEED, "tissue", 0), anatomy, DEMO)
        means.append(float(tissue_HW[cover_HW == 1].mean()))
    assert np.all(np.diff(means) > 0.01), means


@pytest.mark.parametrize("size", [(384, 240), (760, 456)])
def test_texture_has_a_power_law_spectrum(size: tuple[int, int]) -> None:
    canvas, slopes = Canvas(*size), []
    for k in range(8):
        field_HW = random_fields(stream(SEED, "tissue", k), canvas)[0]
        window_HW = np.hanning(size[0])[:, None] * np.hanning(size[1])[None]
        power = np.abs(np.fft.fft2(field_HW * window_HW)) ** 2
        fy, fx = (np.fft.fftfreq(n, 1 / canvas.px_per_mm) for n in size)
        frequency = np.hypot(fy[:, None], fx[None])
        edges = np.geomspace(0.03, 0.6, 10)
        means = [power[(frequency >= a) & (frequency < b)].mean() for a, b in pairwise(edges)]
        slopes.append(np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), np.log(means), 1)[0])
        assert 0.4 < field_HW.std() < 1.8
    assert np.mean(slopes) == pytest.approx(-BETA, abs=0.25)


def test_manufacturers_have_grey_curves_of_their_own() -> None:
    ramp_HW = np.tile(np.linspace(0, 1, 240, dtype=np.float32), (384, 1))
    cover_HW = np.ones_like(ramp_HW)
    middle = {
        scanner: np.mean(
            [expose(stream(0, "scanner", k), ramp_HW, cover_HW, scanner, DEMO)[:, 60].mean() for k in range(8)]
        )
        for scanner in GREY_CURVES
    }
    assert len(middle) == 4
    levels = np.sort(list(middle.values()))
    assert np.all(np.diff(levels) > 3), middle


def test_lesions_have_every_kind_and_size() -> None:
    masses = [mass for exam in range(300) for s in SIDES for mass in plan_breast(SEED, exam, s).masses]
    assert {mass.margin for mass in masses} == {"round", "lobulated", "spiculated"}
    diameters = [mass.diameter_mm for mass in masses]
    assert 6 <= min(diameters) < 10
    assert 34 < max(diameters) <= 40
    clusters = [cluster for exam in range(300) for s in SIDES for cluster in plan_breast(SEED, exam, s).clusters]
    assert min(cluster.spots for cluster in clusters) >= 10
    assert max(cluster.diameter_mm for cluster in clusters) > 15
