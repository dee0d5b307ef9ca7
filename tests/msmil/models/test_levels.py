"""A model called on what `encode` gave before gives what it gives on tiles."""

from __future__ import annotations

import pytest
import torch

from shards.errors import UserError
from tests.msmil.models.small import random_tiles, small_model


def stored(tiles_BNCPP: torch.Tensor, **changes: object) -> dict[int, torch.Tensor]:
    model = small_model(**changes).eval()
    return {level: x.unflatten(0, tiles_BNCPP.shape[:2]) for level, x in model.encode(tiles_BNCPP).items()}


@pytest.mark.parametrize("pooling", ["gated_attention", "pma"])
def test_stored_levels_give_the_output_of_tiles(pooling: str) -> None:
    model, tiles_BNCPP = small_model(pooling=pooling).eval(), random_tiles(3, 2)
    levels = stored(tiles_BNCPP)
    assert tuple(levels) == model.levels
    online, offline = model(tiles_BNCPP), model(None, levels=levels)
    torch.testing.assert_close(offline.logit_BK, online.logit_BK, rtol=0, atol=1e-6)
    torch.testing.assert_close(offline.scale_logit_SBK, online.scale_logit_SBK, rtol=0, atol=1e-6)
    for scale in model.scales:
        torch.testing.assert_close(offline.attention[scale], online.attention[scale], rtol=0, atol=1e-6)


def test_the_order_of_tiles_is_kept() -> None:
    model, tiles_BNCPP = small_model().eval(), random_tiles(1, 3)
    swapped = {level: x.flip(1) for level, x in stored(tiles_BNCPP).items()}
    for scale, weight_BKI in model(None, levels=swapped).attention.items():
        expected = model(tiles_BNCPP).attention[scale].unflatten(2, (3, -1)).flip(2).flatten(2)
        torch.testing.assert_close(weight_BKI, expected, rtol=0, atol=1e-6)


def test_levels_of_another_model_are_refused() -> None:
    model, levels = small_model(), stored(random_tiles(1, 1))
    finest = model.levels[0]
    for wrong in (
        {finest: levels[finest]},
        {**levels, finest: levels[finest][:, 0]},
        {**levels, finest: levels[finest][:, :, :3]},
    ):
        with pytest.raises(UserError, match="the model was called on levels of shapes"):
            model(None, levels=wrong)
