"""Pictures: nothing is clipped, an image keeps its shape, texts state the numbers, and a PNG is whole or absent."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from msmil.evaluation.results import classification_results
from msmil.reporting.figures import (
    MapRow,
    Series,
    classification_figures,
    confusion,
    intervals,
    lines,
    maps_figure,
    png,
    precision_recall,
    roc,
    save,
    scale_weights,
)
from msmil.reporting.figures.series import running_mean
from msmil.types import Prediction
from shards.errors import UserError
from shards.types import Box
from tests import run_folders

pytestmark = pytest.mark.slow

OPTIONS = {"replicates": 30, "confidence": 0.9, "seed": 0}
LONG = "Architectural_Distortion_or_Asymmetry_of_the_Whole_Breast"


def predictions(label="Mass", *, seed=0, target=None, patients=30):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(2 * patients):
        truth = int(rng.random() < 0.3) if target is None else target
        probability = {label: float(1 / (1 + np.exp(-rng.normal() - truth)))}
        rows.append(
            Prediction(f"i{number}", f"e{number // 2}", f"secret{number // 2}", {label: truth}, probability, {}, {})
        )
    return rows


def figures(label="Mass", **options):
    test, validation = predictions(label, **options), predictions(label, seed=1)
    results = classification_results(test, validation, [label], [], **OPTIONS)
    return results["labels"][label], classification_figures(test, results, **OPTIONS)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def outside(axis):
    """Labels of ticks beyond the ends of an axis: they are there, and are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]


def clipped(figure):
    """Texts that leave the picture by more than a pixel."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    undrawn = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in outside(axis)}
    boxes = {
        text.get_text(): text.get_window_extent()
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and text not in undrawn
    }
    return [name for name, b in boxes.items() if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]


@pytest.mark.parametrize("label", ["Mass", LONG])
@pytest.mark.parametrize("kind", ["roc", "precision_recall", "confusion", "reliability"])
def test_no_text_is_clipped(label, kind):
    assert clipped(figures(label)[1][f"{label}_{kind}"]) == []


def test_the_texts_state_the_results():
    found, drawn = figures()
    low, high = found["auroc_ci"]
    assert f"AUROC {found['auroc']:.3f} [{low:.3f}, {high:.3f}]" in texts(drawn["Mass_roc"])
    assert "90% interval (patients resampled)" in texts(drawn["Mass_roc"])
    assert any(f"sens. {found['sensitivity']:.2f}" in text for text in texts(drawn["Mass_roc"]))
    low, high = found["average_precision_ci"]
    wanted = f"average precision {found['average_precision']:.3f} [{low:.3f}, {high:.3f}]"
    assert wanted in texts(drawn["Mass_precision_recall"])
    share = found["positives"] / found["images"]
    assert f"chance: {share:.1%} positive" in texts(drawn["Mass_precision_recall"])
    assert any(f"{found['threshold']:.3f}" in text for text in texts(drawn["Mass_confusion"]))


def test_the_operating_point_lies_on_the_curve():
    found, drawn = figures()
    curve, point = (
        np.column_stack(line.get_data())
        for line in drawn["Mass_roc"].axes[0].get_lines()
        if line.get_label().startswith(("AUROC", "threshold"))
    )
    assert point[0].tolist() == [1 - found["specificity"], found["sensitivity"]]
    assert np.abs(curve - point).max(axis=1).min() < 1e-12


def test_the_confusion_matrix_shows_counts_and_shares_of_the_truth():
    shown = texts(confusion(np.array([[90, 10], [1, 3]]), "Mass", 0.25))
    assert {"90\n90.0%", "10\n10.0%", "1\n25.0%", "3\n75.0%", "negative\n(n = 100)", "positive\n(n = 4)"} <= set(shown)


@pytest.mark.parametrize("target", [0, 1, -1])
def test_a_label_with_one_class_has_no_curves_and_no_error(target):
    _, drawn = figures(target=target)
    assert set(drawn) == {"Mass_confusion"}
    drawn["Mass_confusion"].canvas.draw()


def test_a_single_patient_has_curves_without_a_band():
    test = predictions(patients=1, target=1)[:1] + predictions(patients=1, target=0)[1:]
    results = classification_results(test, predictions(seed=1), ["Mass"], [], **OPTIONS)
    for figure in classification_figures(test, results, **OPTIONS).values():
        assert clipped(figure) == []
        assert not any("patients resampled" in text for text in texts(figure))


def test_the_reliability_diagram_states_its_numbers_and_counts():
    found, drawn = figures()
    shown = texts(drawn["Mass_reliability"])
    low, high = found["calibration"]["brier_ci"]
    error, brier = f"{found['calibration']['ece']:.3f}", f"{found['calibration']['brier']:.3f}"
    assert f"expected calibration error {error}, Brier score {brier} [{low:.3f}, {high:.3f}]" in shown
    counts = [int(text) for text in shown if text.isdigit()]
    assert len(counts) == 10
    assert sum(counts) == found["images"]


def test_the_weights_of_scales_are_drawn_by_truth():
    rows = run_folders.predictions("test")
    figure = scale_weights(rows, "Mass")
    assert clipped(figure) == []
    positives = sum(p.target["Mass"] for p in rows)
    assert {f"positive images (n = {positives})", f"negative images (n = {len(rows) - positives})"} <= set(
        texts(figure)
    )
    assert {"8", "16"} <= set(texts(figure))
    assert scale_weights(predictions(), "Mass") is None, "a model that gives no weights"


def test_lines_of_many_sizes_are_drawn_whole():
    names = ["total", "x" * 90, "one point", "gaps", "nothing", "f", "g", "h"]
    points = [np.geomspace(1e-6, 10, 500), np.ones(40), np.ones(1), np.array([1, np.nan, np.inf, 2]), np.zeros(0)]
    series = [Series(n, np.arange(len(p)), p) for n, p in zip(names, [*points, *points[:3]], strict=True)]
    figure = lines("Training loss", series, y_label="loss", smooth=True, mark=(3.0, "evaluated: step 3"))
    assert clipped(figure) == []
    assert figure.axes[0].get_yscale() == "log"
    assert "step, with running means" in texts(figure)
    assert {"total", "evaluated: step 3"} <= set(texts(figure))


def test_a_running_mean_is_that_of_the_points_before():
    values = np.array([1.0, np.nan, 3.0, 5.0, 7.0, np.nan, np.nan, np.nan])
    wanted = [1, 1, 2, 4, 5, 6, 7, np.nan]
    np.testing.assert_allclose(running_mean(values, 3), wanted)


def test_intervals_of_many_runs_are_drawn_whole():
    rows = [(f"a/very/long/name/of/a/run_{i}", 0.5 + i / 100, None if i % 3 else (0.4, 0.9)) for i in range(40)]
    figure = intervals("Mass: AUROC", rows, x_label="AUROC, 95% interval")
    assert clipped(figure) == []
    assert ".../long/name/of/a/run_7" in texts(figure)


def test_a_small_png_is_white_where_paper_is():
    with Image.open(io.BytesIO(png(confusion(np.eye(2, dtype=int), "Mass", 0.5)))) as picture:
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
        assert picture.mode == "P"


@pytest.mark.parametrize("draw", [roc, precision_recall])
def test_an_undefined_area_is_said(draw):
    from msmil.evaluation.bootstrap import PatientBootstrap
    from msmil.evaluation.classification import rank

    bootstrap = PatientBootstrap(["a", "b"], replicates=0, seed=0)
    curve = bootstrap.roc(rank(np.array([1, 0]), np.array([0.9, 0.1])), 0.95)
    assert any("undefined" in text for text in texts(draw(curve, "Mass", None, None)))


def row(height, width, *, names=("merged", "attention_8", "instance_16"), dtype=np.uint8, boxes=(), title="p 0.93"):
    rng = np.random.default_rng(0)
    image = (rng.random((height, width)) * np.iinfo(dtype).max).astype(dtype)
    breast = np.zeros((height, width), bool)
    breast[:, : width // 2] = True
    return MapRow(title, image, breast, {name: rng.normal(size=(height, width)) for name in names}, boxes)


def pictures(figure):
    """Axes that show an image, row by row."""
    return [axes for axes in figure.axes if axes.get_images()]


@pytest.mark.parametrize("shapes", [[(384, 240)], [(100, 300)], [(900, 100)], [(152, 91), (80, 200), (60, 60)]])
@pytest.mark.parametrize("names", [("merged",), ("merged", "attention_8", "attention_16", "instance_8", "instance_16")])
def test_an_image_of_any_shape_keeps_it_inside_the_picture(shapes, names):
    figure = maps_figure([row(*shape, names=names, title="image " + "a" * 32) for shape in shapes], "Mass")
    assert clipped(figure) == []
    panels = pictures(figure)
    assert len(panels) == len(shapes) * (1 + len(names))
    columns = 1 + len(names)
    for number, axes in enumerate(panels):
        height, width = shapes[number // columns]
        shown = axes.get_window_extent()
        assert shown.height / shown.width == pytest.approx(height / width, rel=0.02)
        assert shown.height > 40
        assert figure.bbox.padded(1).containsx(shown.x0)
        assert figure.bbox.padded(1).containsx(shown.x1)
        assert figure.bbox.padded(1).containsy(shown.y0)
    extents = [axes.get_window_extent() for axes in panels]
    assert not any(a.padded(-1).overlaps(b.padded(-1)) for i, a in enumerate(extents) for b in extents[:i])


def test_only_boxes_of_the_label_are_drawn_and_where_they_are():
    boxes = [Box("Mass", 10, 20, 30, 50), Box("Suspicious_Calcification", 0, 0, 5, 5)]
    figure = maps_figure([row(100, 80, boxes=boxes)], "Mass")
    for axes in pictures(figure):
        (frame,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        # Pixel 10 begins at 9.5 in the axes of a picture.
        assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (9.5, 19.5, 20, 30)


def test_a_map_spans_all_colours_inside_the_breast_and_none_outside():
    figure = maps_figure([row(40, 40)], "Mass")
    shown = pictures(figure)[2].get_images()[0].get_array()
    assert (shown[:, 20:, 3] == 0).all()
    assert (shown[:, :20, 3] == 1).all()
    inside = shown[:, :20, :3].reshape(-1, 3)
    for end in ("#440154", "#fde725"):  # both ends of viridis
        assert np.abs(inside - np.array(to_rgb(end))).max(axis=1).min() < 0.01


def test_the_merged_map_lies_over_the_image():
    images = pictures(maps_figure([row(40, 40, dtype=np.uint16)], "Mass"))[1].get_images()
    assert len(images) == 2
    alpha = images[1].get_array()[..., 3]
    assert 0 < alpha[:, :20].min() < alpha[:, :20].max() < 1


def test_a_constant_map_is_drawn():
    flat = row(20, 20)
    figure = maps_figure([MapRow("flat", flat.image_HW * 0, flat.breast_HW, {"merged": np.zeros((20, 20))})], "Mass")
    assert clipped(figure) == []


def test_headings_name_the_kind_and_the_scale():
    shown = texts(maps_figure([row(40, 40)], "Suspicious_Calcification"))
    assert {"image", "merged", "attention\nscale 8", "instance\nscale 16", "Suspicious Calcification"} <= set(shown)


def test_no_figure_shows_a_patient():
    assert not any("secret" in text for figure in figures()[1].values() for text in texts(figure))


def test_a_saved_figure_is_a_png_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "figures" / "maps.png"
    save(maps_figure([row(40, 40)], "Mass"), path)
    assert Image.open(path).format == "PNG"
    assert list(path.parent.iterdir()) == [path]


def test_a_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "confusion.png"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError):
        save(confusion(np.eye(2, dtype=int), "Mass", 0.5), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_needs_no_pyplot():
    code = "import sys, msmil.reporting.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
