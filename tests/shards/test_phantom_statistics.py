"""Phantoms are honest: no statistic that knows nothing of lesions tells an image's label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata

from shards.codecs import encode
from shards.phantoms.canvas import Canvas
from shards.phantoms.draw import draw_phantom
from shards.phantoms.exam import LABELS, SIDES, VIEWS
from shards.pool import run_tasks

SEED = 20
EXAMS = 250  # four images each; one AUROC of 270 positives among 1,000 has a standard error of about .02
QUANTILES = (np.arange(256) + 0.5) / 256
NAMES = ("mean", "max", "file size", *(f"quantile {q:.3f}" for q in QUANTILES))
BOUND = {"image": 0.70, "breast": 0.75}


def statistics(image_HW: NDArray[np.uint8], seen_HW: NDArray[np.bool_]) -> list[float]:
    """Mean, maximum and 256 quantiles of the grey values that are seen, and the size of a PNG of them."""
    grey = image_HW[seen_HW]
    cumulative = np.cumsum(np.bincount(grey, minlength=256))
    quantiles = np.searchsorted(cumulative, QUANTILES * cumulative[-1])
    file_size = len(encode(np.where(seen_HW, image_HW, 0).astype(np.uint8), "png"))
    return [float(grey.mean()), float(grey.max()), float(file_size), *map(float, quantiles)]


def measure_exam(exam: int, tick: Callable[[], object]) -> list[dict[str, list[float]]]:
    measured = []
    for side in SIDES:
        for view in VIEWS:
            phantom = draw_phantom(SEED, exam, side, view, Canvas(384, 240))
            everything_HW = np.ones_like(phantom.breast_HW)
            measured.append(
                {
                    "image": statistics(phantom.image_HW, everything_HW),
                    "breast": statistics(phantom.image_HW, phantom.breast_HW),
                    "label": [float(phantom.plan.labels[label]) for label in LABELS],
                    "is MLO": [float(view == "MLO")],
                }
            )
            tick()
    return measured


@pytest.fixture(scope="module")
def measured() -> dict[str, NDArray[np.float64]]:
    results = run_tasks(measure_exam, range(EXAMS), processes=2, what="", unit="", total=4 * EXAMS, quiet=True)
    images = [image for exam in results for image in exam]
    return {key: np.array([image[key] for image in images]) for key in images[0]}


def worst(statistic_NS: NDArray[np.float64], positive_N: NDArray[np.bool_]) -> tuple[float, str]:
    """The statistic that separates best, as max(AUROC, 1 - AUROC), by the rank sum (ties count half)."""
    positives = positive_N.sum()
    ranks_NS = rankdata(statistic_NS, axis=0)
    wins_S = ranks_NS[positive_N].sum(axis=0) - positives * (positives + 1) / 2
    auroc_S = wins_S / (positives * (len(positive_N) - positives))
    separation_S = np.maximum(auroc_S, 1 - auroc_S)
    return float(separation_S.max()), NAMES[int(separation_S.argmax())]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("looked_at", ["image", "breast"])
@pytest.mark.parametrize("label", LABELS)
def test_no_trivial_statistic_tells_a_label(
    measured: dict[str, NDArray[np.float64]], label: str, looked_at: str
) -> None:
    positive_N = measured["label"][:, LABELS.index(label)] == 1
    assert len(positive_N) >= 1000
    assert 0.22 <= positive_N.mean() <= 0.32
    separation, name = worst(measured[looked_at], positive_N)
    assert separation <= BOUND[looked_at], name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("looked_at", ["image", "breast"])
def test_the_statistics_tell_what_is_trivial(measured: dict[str, NDArray[np.float64]], looked_at: str) -> None:
    """The muscle makes MLO views brighter; a test that missed it would prove nothing about lesions."""
    assert worst(measured[looked_at], measured["is MLO"][:, 0] == 1)[0] > 0.75
