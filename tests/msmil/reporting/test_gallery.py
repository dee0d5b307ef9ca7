"""The gallery: the right images are chosen, pictures are small and nameless, and a folder is whole or as before."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from msmil.reporting.figures import MapRow, panel, reduced
from msmil.reporting.gallery import Case, Choice, choose, read_gallery, writing_gallery
from msmil.types import Prediction
from shards.errors import UserError
from shards.types import Box
from tests.run_folders import SECRET, make_run, map_row

TRUTH = [(1, 0.9), (0, 0.8), (1, 0.4), (1, 0.2), (0, 0.1), (-1, 0.99), (1, 0.7), (0, 0.6)]
ABOUT = {"split": "test", "checkpoint": "step_1", "data_fingerprint": "f"}


def rows() -> list[Prediction]:
    return [Prediction(f"i{n}", "e", "p", {"Mass": t}, {"Mass": p}, {}, {}) for n, (t, p) in enumerate(TRUTH, start=1)]


def numbers(threshold: float | None, per_kind: int) -> dict[str, list[int]]:
    chosen, _ = choose(rows(), "Mass", threshold, per_kind)
    return {kind: [c.number for c in chosen if c.kind == kind] for kind in ("hit", "miss", "false_alarm")}


def test_the_most_telling_come_first() -> None:
    assert numbers(0.5, 9) == {"hit": [1, 7], "miss": [4, 3], "false_alarm": [2, 8]}
    assert numbers(0.5, 1) == {"hit": [1], "miss": [4], "false_alarm": [2]}
    assert choose(rows(), "Mass", 0.5, 1)[1] == {"hit": 2, "miss": 2, "false_alarm": 2}


def test_without_a_threshold_no_image_is_shown_twice() -> None:
    assert numbers(None, 9) == {"hit": [1, 7], "miss": [4, 3], "false_alarm": [2, 8, 5]}


def test_a_label_without_positives_has_false_alarms_alone() -> None:
    negative = [Prediction(f"i{n}", "e", "p", {"Mass": 0}, {"Mass": 0.9}, {}, {}) for n in range(3)]
    chosen, counts = choose(negative, "Mass", 0.5, 2)
    assert [c.kind for c in chosen] == ["false_alarm"] * 2
    assert counts == {"hit": 0, "miss": 0, "false_alarm": 3}


@pytest.mark.parametrize("shape", [(1520, 912), (100, 1900), (1900, 60), (3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_of_any_shape_become_small_pictures(shape: tuple[int, int], dtype: type) -> None:
    row = map_row(np.random.default_rng(0), shape, boxes=[Box("Mass", 0, 0, 1, 1)])
    row = reduced(MapRow(row.title, row.image_HW.astype(dtype) * 3, row.breast_HW, row.maps, row.boxes), 320)
    for name in (None, *row.maps):
        picture = panel(row, name, "Mass")
        assert picture.dtype == np.uint8
        assert max(picture.shape[:2]) <= 320
        ratio = picture.shape[0] / picture.shape[1]
        assert ratio == pytest.approx(shape[0] / shape[1], rel=0.08) or max(shape) > 320 > 10 * min(picture.shape[:2])


def test_boxes_go_where_they_belong() -> None:
    flat = np.full((100, 80), 50, np.uint8)
    boxes = [Box("Mass", 20, 30, 40, 60), Box("Other", 50, 70, 60, 90)]
    row = MapRow("", flat, np.ones((100, 80), bool), {"merged": flat * 0.0, "attention_8": flat * 0.0}, boxes)
    image, other = panel(row, None, "Mass"), panel(row, "attention_8", "Mass")
    inside = image[30:60, 20:40]
    assert (inside == inside[0, 0]).all(), "a frame hides nothing of its box"
    assert (image[30:60, 18] == 255).all(), "a line at its left"
    assert 0 < (image[70:90, 48] == 255).mean() < 1, "another label's box is dashed"
    assert (other[70:90, 48] == other[0, 0]).all(), "and drawn on the image alone"
    half = reduced(row, 50)
    assert next((b.x0, b.y0, b.x1, b.y1) for b in half.boxes) == (10, 15, 20, 30)


def test_a_written_gallery_is_read_back(tmp_path) -> None:
    make_run(tmp_path / "run")
    gallery = read_gallery(tmp_path / "run" / "gallery" / "test")
    assert gallery is not None
    first = gallery.index["cases"][0]
    assert (first["label"], first["kind"], first["view"]) == ("Mass", "hit", "R MLO")
    names = ["image", "merged", "attention_8", "attention_16", "instance_8", "instance_16"]
    assert [picture["name"] for picture in first["pictures"]] == names
    files = sorted((tmp_path / "run" / "gallery" / "test").glob("*.jpg"))
    assert len(files) == len(names) * len(gallery.index["cases"])
    for file in files:
        assert SECRET not in file.name
        assert SECRET.encode() not in file.read_bytes()
        with Image.open(file) as picture:
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_a_failed_writing_leaves_the_gallery_before_it(tmp_path) -> None:
    folder = tmp_path / "gallery" / "test"
    with writing_gallery(folder, ABOUT) as writer:
        writer.label("Mass", threshold=0.5, counts={})
    before = (folder / "index.json").read_bytes()
    with pytest.raises(UserError, match="disk"), writing_gallery(folder, ABOUT) as writer:
        raise OSError(28, "disk is full")
    assert (folder / "index.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["test"]


def test_a_new_gallery_replaces_all_of_the_old(tmp_path) -> None:
    folder = tmp_path / "test"
    for count in (2, 1):
        with writing_gallery(folder, ABOUT) as writer:
            for number in range(count):
                choice = Choice("hit", number + 1, rows()[0])
                writer.add(Case(label="Mass", choice=choice, row=map_row(np.random.default_rng(0), (8, 6))))
    assert len(json.loads((folder / "index.json").read_text())["cases"]) == 1
    assert not list(folder.glob("0002*"))


@pytest.mark.parametrize("text", ["", "[]", '{"version": 99}', "{"])
def test_what_cannot_be_read_is_no_gallery(tmp_path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    assert read_gallery(tmp_path) is None
    assert read_gallery(tmp_path / "nowhere") is None
