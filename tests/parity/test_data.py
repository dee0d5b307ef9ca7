"""What happens to images, tables and numbers around the model is what the published system does (data.json).

Learning rates: tests/msmil/engine/test_optim.py. Losses: test_losses.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msmil.bags.normalise import standard_black
from msmil.bags.tiling import make_bag
from msmil.config import BagConfig
from msmil.evaluation.legacy import legacy_scores
from shards.folds import published_folds
from shards.sources.grouped_table import read_grouped_table
from tests.archives import GroupedArchive
from tests.parity.published import DATA, MEAN, STD, golden

GOLDEN: dict[str, Any] = json.loads((DATA / "data.json").read_text())


def standardised(case: dict[str, Any]) -> Tensor:
    """The input of a padding case, [1, 1, H, W]."""
    if case["input"].startswith("torch.rand"):
        x_HW = torch.rand(3, *case["shape"], generator=torch.Generator().manual_seed(3)).mean(0)
    else:
        x_HW = torch.from_numpy(golden("input")["image"].astype(np.float32)) / 255
        flips: dict[str, list[int]] = {"as_is": [], "flip_lr": [1], "flip_ud": [0]}
        x_HW = x_HW.flip(flips[case["input"]])
    return ((x_HW - MEAN) / STD)[None, None]


@pytest.mark.parametrize("case", GOLDEN["padding"], ids=lambda c: f"{c['input'][:7]}-{c['shape']}-{c['patch_size']}")
def test_padding(case: dict[str, Any]) -> None:
    config = BagConfig(instances="tiles", tile_size_px=case["patch_size"], padding="legacy")
    black = standard_black(MEAN, STD)
    bag = make_bag(standardised(case), config, in_channels=3, black=black)
    _, *padded_hw = case["padded"]
    left, right, top, bottom = case["padding_l_r_t_b"]
    assert list(bag.padded_hw) == padded_hw
    assert (bag.pad_left_B.item(), bag.pad_top_B.item()) == (left, top)
    assert [top + case["shape"][0] + bottom, left + case["shape"][1] + right] == padded_hw
    assert black == pytest.approx(case.get("corner_value", black), abs=1e-7)


@pytest.mark.parametrize(
    "case", GOLDEN["patching"], ids=lambda c: f"{c['multi_scale_model']}-{c['scales']}-{c['overlap'][0]}"
)
def test_tiles(case: dict[str, Any]) -> None:
    kind, scales = case["multi_scale_model"], case["scales"]
    sizes = {"fpn": None, None: scales[0], "msp": tuple(scales)}[kind]
    (overlap,) = set(case["overlap"])
    config = BagConfig(instances="tiles", tile_size_px=case["patch_size"], tile_overlap=overlap)
    bag = make_bag(torch.zeros(1, 1, *case["image"]), config, in_channels=1, black=-1.0, sizes=sizes)
    for size in map(str, scales) if kind == "msp" else [""]:
        tiles_BNCPP, origin_N2 = bag.of_scale(int(size or 0))
        corners = case["coords"][size] if size else case["coords"]
        shape = case["patches_shape"][size] if size else case["patches_shape"]
        assert list(tiles_BNCPP.shape[1:]) == shape
        found = origin_N2.tolist()
        assert found == [[x, y] for y in corners["ys"] for x in corners["xs"]]
        assert (len(found), found[:3]) == (corners["n"], corners["first"])
        assert found[-len(corners["last"]) :] == corners["last"]


def test_boxes_of_a_category(tiny_archive: GroupedArchive) -> None:
    """A finding of several categories is a box of each; inverted corners are swapped, the rest is taken as it is."""
    case = GOLDEN["boxes"]
    columns = ("finding_categories", "resized_xmin", "resized_ymin", "resized_xmax", "resized_ymax")
    tiny_archive.rows[0] |= {name: case[name] for name in columns} | {"Mass": "1", "Suspicious_Calcification": "1"}
    tiny_archive.write_table()
    boxes = read_grouped_table(tiny_archive.table, tiny_archive.images).rows[0].boxes
    for category in ("Mass", "Suspicious Calcification", "Architectural Distortion"):
        found = [[b.x0, b.y0, b.x1, b.y1] for b in boxes if b.label == category.replace(" ", "_")]
        assert found == case[category]


@pytest.mark.parametrize("order", ["table", "shuffled"])
def test_the_split_and_its_folds(order: str) -> None:
    """The order of the images changes no fold: the published seed, which only shuffles them, has no say."""
    case = GOLDEN["split"]
    image_M = np.arange(400) if order == "table" else np.random.default_rng(0).permutation(400)
    positive_M = np.array(case["labels"]) == 1
    fold_M = published_folds([str(image // 4) for image in image_M], positive_M[image_M], 5)
    names = np.array([f"i{image:04}.png" for image in image_M])
    assert sorted(names[fold_M == 0]) == sorted(case["val_image_ids"]) == case["fold0_val_sorted"]
    assert set(case["train_head"]) <= set(names[fold_M != 0])
    assert np.bincount(fold_M).tolist() == case["fold_val_sizes"]
    validating = np.isin(names, case["val_image_ids"])
    assert (validating.sum(), positive_M[image_M][validating].sum()) == (case["n_val"], case["n_pos_val"])


def test_metrics() -> None:
    case = GOLDEN["metrics"]
    found = legacy_scores(np.array(case["target"], np.int64), np.array(case["prob"]))
    assert found == {
        "auroc": pytest.approx(case["auc"], rel=1e-12),
        "f1_weighted": pytest.approx(case["f1_weighted"], rel=1e-12),
        "balanced_accuracy": pytest.approx(case["balanced_accuracy"], rel=1e-12),
    }


def test_nothing_of_the_file_is_left_out() -> None:
    assert set(GOLDEN) == {"padding", "patching", "boxes", "split", "metrics"} | {"lr_multiplier", "loss"}
