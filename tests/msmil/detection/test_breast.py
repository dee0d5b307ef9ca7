"""The breast in a stored mammogram: found beside labels and markers, at any depth and size, never empty."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msmil.detection.breast import breast_mask, breast_masks

REAL = Path(os.environ.get("MSMIL_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))


def mammogram(height, width, dtype, *, air=0.0):
    """A half ellipse of uneven tissue on the left, a white corner label, a marker on the skin, noise; and the truth."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    breast = ((y - 0.5) / 0.42) ** 2 + (x / 0.6) ** 2 < 1
    tissue = 0.12 + 0.5 * np.exp(-(((y - 0.5) / 0.15) ** 2 + ((x - 0.2) / 0.15) ** 2))
    image = np.where(breast, tissue, air) + 0.01 * rng.random((height, width))
    image[(y < 0.12) & (x > 0.8)] = 1.0
    image[(y - 0.5) ** 2 + (x - 0.6) ** 2 < 0.008**2] = 1.0
    return (image.clip(0, 1) * np.iinfo(dtype).max).astype(dtype), breast


@pytest.mark.parametrize("size", [(384, 240), (1520, 912), (300, 900), (97, 61)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("air", [0.0, 0.02])
@pytest.mark.parametrize("flip", [False, True])
def test_the_mask_is_the_breast_without_its_labels(size, dtype, air, flip):
    image, breast = mammogram(*size, dtype, air=air)
    if flip:
        image, breast = image[:, ::-1], breast[:, ::-1]
    found = breast_mask(image)
    assert (found.shape, found.dtype) == (image.shape, np.bool_)
    assert (found & breast).sum() / (found | breast).sum() > 0.93
    corner = found[: size[0] // 10, : size[1] // 6] if flip else found[: size[0] // 10, -size[1] // 6 :]
    assert not corner.any()


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_without_contrast_counts_as_a_whole(value):
    assert breast_mask(np.full((50, 40), value, np.uint8)).all()


def test_a_dark_hole_inside_the_breast_belongs_to_it():
    image, _ = mammogram(384, 240, np.uint8)
    image[180:200, 60:80] = 0
    assert breast_mask(image)[180:200, 60:80].all()


def test_a_marker_that_touches_the_skin_is_cut_off():
    image, breast = mammogram(384, 240, np.uint8)
    y, x = np.mgrid[:384, :240]
    marker = (y - 192) ** 2 + (x - 149) ** 2 < 4**2
    image[marker] = 255
    beyond = marker & ~breast & (x > 148)
    assert beyond.sum() > 20
    assert (breast_mask(image) & beyond).sum() <= 0.3 * beyond.sum()


def test_an_image_that_tissue_fills_is_not_torn_apart():
    rng = np.random.default_rng(0)
    image = (100 + 20 * rng.random((200, 100))).astype(np.uint8)
    image[190:, 90:] = 0
    assert breast_mask(image)[:180, :80].all()


def test_a_batch_has_one_mask_per_image():
    first, second = mammogram(96, 64, np.uint16)[0], mammogram(96, 64, np.uint16)[0][:, ::-1]
    found = breast_masks(torch.from_numpy(np.stack([first, second])[:, None].copy()))
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), [breast_mask(first), breast_mask(second)])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real mammograms in {REAL}; set MSMIL_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("real_exam_8bit/L-CC.png", 0.50),
        ("real_exam_8bit/L-MLO.png", 0.64),
        ("real_exam_8bit/R-CC.png", 0.43),
        ("real_exam_8bit/R-MLO.png", 0.56),
        ("real_pair_16bit/Calc-Test_P_00041_LEFT_CC.png", 0.44),
        ("real_pair_16bit/Calc-Test_P_00041_LEFT_MLO.png", 0.43),
    ],
)
def test_real_mammograms_have_the_breast_that_was_seen_in_their_pictures(name, share):
    image = np.array(Image.open(REAL / name))
    found = breast_mask(image)
    assert found.mean() == pytest.approx(share, abs=0.02)
    height, width = image.shape
    assert found[height // 3 : height // 2, : width // 4].all()
    assert not found[: height // 10, -width // 8 :].any()
