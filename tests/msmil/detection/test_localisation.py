"""Peak in box: counted per label and map over the images with a box of the label, beside what chance would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msmil.detection.localisation import PeakHits, box_mask, peaks
from shards.types import Box

LABELS = ("Mass", "Suspicious_Calcification")


def map_with_peak(y, x, size=(10, 10)):
    map_HW = torch.zeros(size)
    map_HW[y, x] = 1.0
    return map_HW


def everything(batch=1, size=(10, 10)):
    return torch.ones(batch, *size, dtype=torch.bool)


@pytest.mark.parametrize(
    ("peak", "hit"),
    [((2, 3), True), ((5, 6), True), ((1, 3), False), ((2, 2), False), ((6, 6), False), ((5, 7), False)],
)
def test_a_peak_hits_where_the_centre_of_its_pixel_lies_in_the_box(peak, hit):
    hits = PeakHits(["Mass"], ["merged"])
    # Columns 3..6 and rows 2..5: the centre of column 7 is 7.5, on the exclusive end.
    box = Box("Mass", 3.5, 2.2, 7.5, 6.5)
    hits.add({"merged": map_with_peak(*peak)[None, None]}, everything(), [[box]])
    assert hits.results()["Mass"]["merged"]["hits"] == int(hit)


def test_box_mask_agrees_with_its_area_on_whole_pixels():
    found = box_mask([Box("a", 1, 2, 4, 6), Box("a", 3, 2, 5, 3)], (8, 9))
    expected = np.zeros((8, 9), bool)
    expected[2:6, 1:4] = True
    expected[2, 3:5] = True
    np.testing.assert_array_equal(found, expected)


def test_the_peak_is_looked_for_inside_the_breast():
    map_BKHW = torch.stack([map_with_peak(0, 9), map_with_peak(4, 4) * 0.5]).amax(0)[None, None]
    breast_BHW = everything()
    breast_BHW[0, :, 8:] = False
    assert peaks(map_BKHW, breast_BHW).tolist() == [[44]]
    assert peaks(-map_BKHW - 5, breast_BHW).tolist() == [[0]]  # negative values are values too


def test_images_count_for_the_labels_of_their_boxes_alone():
    mass, calcification = Box("Mass", 0, 0, 5, 5), Box("Suspicious_Calcification", 5, 5, 10, 10)
    other = Box("Skin_Thickening", 0, 0, 10, 10)
    map_BKHW = torch.stack([torch.stack([map_with_peak(1, 1), map_with_peak(1, 1)])] * 4)
    hits = PeakHits(LABELS, ["merged"])
    hits.add({"merged": map_BKHW}, everything(4), [[mass, calcification], [mass], [other], []])
    assert hits.results() == {
        "Mass": {"merged": {"images": 2, "hits": 2, "rate": 1.0, "chance": 0.25, "ratio": 4.0}},
        "Suspicious_Calcification": {"merged": {"images": 1, "hits": 0, "rate": 0.0, "chance": 0.25, "ratio": 0.0}},
    }


def test_chance_is_the_share_of_the_breast_and_overlapping_boxes_count_once():
    breast_BHW = everything()
    breast_BHW[0, :, 5:] = False
    boxes = [Box("Mass", 0, 0, 10, 2), Box("Mass", 0, 1, 10, 3)]
    hits = PeakHits(["Mass"], ["merged"])
    hits.add({"merged": map_with_peak(1, 1)[None, None]}, breast_BHW, [boxes])
    assert hits.results()["Mass"]["merged"]["chance"] == pytest.approx(15 / 50)


def test_random_maps_hit_as_often_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    hits = PeakHits(["Mass"], ["merged", "attention_8"])
    for _ in range(20):
        breast_BHW = torch.rand(50, 24, 16, generator=generator) > 0.4
        boxes = []
        for _ in range(50):
            x0, y0 = rng.uniform(0, 8), rng.uniform(0, 12)
            boxes.append([Box("Mass", x0, y0, x0 + rng.uniform(2, 8), y0 + rng.uniform(2, 12))])
        maps = {name: torch.rand(50, 1, 24, 16, generator=generator) for name in ("merged", "attention_8")}
        hits.add(maps, breast_BHW, boxes)
    for found in hits.results()["Mass"].values():
        spread = np.sqrt(found["chance"] * (1 - found["chance"]) / 1000)
        assert found["images"] == 1000
        assert abs(found["rate"] - found["chance"]) < 4 * spread
        assert found["ratio"] == pytest.approx(found["rate"] / found["chance"])


def test_counts_of_several_processes_add_up():
    generator = torch.Generator().manual_seed(1)
    maps_BKHW = torch.rand(6, 2, 10, 10, generator=generator)
    boxes = [[Box(LABELS[i % 2], 0, 0, 10, 4)] for i in range(6)]
    together = PeakHits(LABELS, ["merged"])
    together.add({"merged": maps_BKHW}, everything(6), boxes)
    parts = [PeakHits(LABELS, ["merged"]) for _ in range(2)]
    parts[0].add({"merged": maps_BKHW[:4]}, everything(4), boxes[:4])
    parts[1].add({"merged": maps_BKHW[4:]}, everything(2), boxes[4:])
    parts[0].count_KM3 += parts[1].count_KM3
    assert parts[0].results() == together.results()


def test_without_images_there_is_no_rate():
    none = {"images": 0, "hits": 0, "rate": None, "chance": None, "ratio": None}
    assert PeakHits(["Mass"], ["merged"]).results() == {"Mass": {"merged": none}}


def test_boxes_outside_the_breast_leave_no_ratio():
    breast_BHW = everything()
    breast_BHW[0, 5:] = False
    hits = PeakHits(["Mass"], ["merged"])
    hits.add({"merged": map_with_peak(1, 1)[None, None]}, breast_BHW, [[Box("Mass", 0, 6, 4, 9)]])
    assert hits.results()["Mass"]["merged"] == {"images": 1, "hits": 0, "rate": 0.0, "chance": 0.0, "ratio": None}
