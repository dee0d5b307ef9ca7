from __future__ import annotations

import pytest

from msmil.models.build import build_model, inducing_points
from shards.errors import UserError
from tests.msmil.models.small import random_tiles, small_config, small_model


@pytest.mark.parametrize(
    ("instances", "points"), [(6144, 38), (1536, 32), (96, 20), (24, 14), (11, 11), (10, 10), (1, 1)]
)
def test_inducing_points_are_those_of_the_paper(instances: int, points: int) -> None:
    assert inducing_points(instances) == points


def isab_points(*, padded_hw: tuple[int, int], tile_hw: tuple[int, int], tiles: int, **changes: object) -> list[int]:
    config = small_config(**{"mil_encoder": "isab", "scales": (16, 32, 128), "inducing_points": "auto", **changes})
    model = build_model(config, num_labels=1, padded_hw=padded_hw, tile_hw=tile_hw, tiles=tiles)
    return [
        parameter.shape[1] for name, parameter in model.named_parameters() if name.endswith("blocks.0.inducing_1MD")
    ]


@pytest.mark.parametrize("tiles", [6, 15, 45])
def test_overlap_does_not_change_the_shapes_of_parameters(tiles: int) -> None:
    assert isab_points(padded_hw=(1536, 1024), tile_hw=(512, 512), tiles=tiles) == [38, 32, 20]


def test_a_whole_image_has_the_points_of_its_tiles() -> None:
    assert isab_points(padded_hw=(1536, 1024), tile_hw=(1536, 1024), tiles=1) == [38, 32, 20]


def test_tiles_that_are_instances_have_points_by_their_number_without_overlap() -> None:
    points = isab_points(
        padded_hw=(1536, 1024), tile_hw=(512, 512), tiles=45, instance_encoder="msp", scales=(128, 256, 384)
    )
    assert points == [20, 14, 11]


def test_regions_have_points_of_their_own() -> None:
    shape = {"padded_hw": (1536, 1024), "tile_hw": (512, 512), "tiles": 45, "nested": True}
    assert isab_points(**shape) == [31, 25, 13, 6]
    assert isab_points(**shape, region_inducing_points=9) == [31, 25, 13, 9]


def test_tiles_that_are_instances_take_the_deepest_map_and_any_size() -> None:
    model = small_model(instance_encoder="single", scales=(50,), inducing_points="auto")
    assert model.pyramid is None
    assert model.backbone.strides == (32,)
    assert model(random_tiles(1, 3, hw=(50, 50))).logit_BK.shape == (1, 2)


def test_points_can_be_given() -> None:
    points = isab_points(padded_hw=(512, 512), tile_hw=(512, 512), tiles=1, inducing_points=(7, 5, 3))
    assert points == [7, 5, 3]


def test_scales_and_names_of_parts() -> None:
    model = small_model()
    assert model.scales == (16, 32, 64)
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "backbone",
        "pyramid",
        "branches",
        "scale_attention",
        "classifier",
    }


def test_blocks_of_a_set_encoder() -> None:
    model = small_model(mil_encoder="sab", encoder_blocks=3, fpn_dim=12)
    weights = {name: p.shape for name, p in model.branches["16"].encoder.named_parameters() if "fc_q.weight" in name}
    assert list(weights.values()) == [(16, 12), (16, 16), (16, 16)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mil_encoder": "sab", "encoder_heads": 3}, "model.encoder_heads is 3, which does not divide"),
        ({"pooling": "pma", "pma_heads": 5}, "model.pma_heads is 5, which does not divide"),
    ],
)
def test_heads_must_divide_the_width(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_model(**changes)


def test_heads_of_parts_that_are_not_used_do_not_matter() -> None:
    assert small_model(encoder_heads=3, pma_heads=5).scales == (16, 32, 64)
