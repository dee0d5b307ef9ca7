"""A model called on what `encode` gave before gives what it gives on tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from msmil.models.mil import MILModel
from shards.errors import UserError
from tests.msmil.models.small import random_tiles, small_model
from tests.msmil.models.variants import variant_model, variant_tiles


def stored(model: MILModel, tiles: Any) -> dict[int, Tensor]:
    with torch.no_grad():
        return {level: part.x_MX.unflatten(0, part.bags_tiles) for level, part in model.encode(tiles).items()}


@pytest.mark.parametrize("name", ["backbone_pyramid", "concatenation", "mean_p", "single", "msp_sets", "nested_sets"])
@pytest.mark.parametrize("masked", [False, True])
def test_stored_levels_give_the_output_of_tiles(name: str, masked: bool) -> None:
    model = variant_model(name).double().eval()
    tiles = variant_tiles(model, 3, 2)
    mask: Any = None
    if masked:  # the second bag has one tile less of each size
        counts = {s: part.shape[1] for s, part in tiles.items()} if isinstance(tiles, dict) else {0: tiles.shape[1]}
        masks = {s: torch.tensor([[True] * n, [True] * (n - 1) + [False], [True] * n]) for s, n in counts.items()}
        mask = masks if isinstance(tiles, dict) else masks[0]
    levels = stored(model, tiles)
    assert tuple(levels) == tuple(model.levels)
    online, offline = model(tiles, mask), model(None, mask, levels=levels)
    torch.testing.assert_close(offline.logit_BK, online.logit_BK)
    for scale, weight_BKI in (online.attention or {}).items():
        torch.testing.assert_close(offline.attention[scale], weight_BKI)


def test_the_order_of_tiles_is_kept() -> None:
    model, tiles_BNCPP = small_model().eval(), random_tiles(1, 3)
    swapped = {level: x.flip(1) for level, x in stored(model, tiles_BNCPP).items()}
    for scale, weight_BKI in model(None, levels=swapped).attention.items():
        expected = model(tiles_BNCPP).attention[scale].unflatten(2, (3, -1)).flip(2).flatten(2)
        torch.testing.assert_close(weight_BKI, expected, rtol=0, atol=1e-6)


def test_levels_of_another_model_are_refused() -> None:
    model = small_model()
    levels = stored(model, random_tiles(1, 1))
    finest = next(iter(model.levels))
    for wrong in (
        {finest: levels[finest]},
        {**levels, finest: levels[finest][:, 0]},
        {**levels, finest: levels[finest][:, :, :3]},
    ):
        with pytest.raises(UserError, match="the model was called on levels of shapes"):
            model(None, levels=wrong)


def test_a_mask_of_another_shape_is_refused() -> None:
    model = small_model()
    with pytest.raises(UserError, match="the tile mask has shape"):
        model(None, torch.ones(1, 3, dtype=torch.bool), levels=stored(model, random_tiles(1, 2)))
