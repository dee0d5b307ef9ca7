"""A published checkpoint as a model that can be called.

Legend: B bags, N tiles, C channels, P tile side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msmil.models.published.convert import Source, convert
from shards.errors import UserError


def load_published(
    path_or_state_dict: Source, encoder: Source | None = None, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """A published checkpoint (best_model.pth, or its state dict) as a model in eval mode on the CPU.

    It has the precision of the file; half precision becomes float32.

    Called on normalised tiles [B, N, C, P, P] it returns a BagOutput; a model of tiles of several sizes (msp) is
    called on {size: tiles}. C is 3, or 1 for grey tiles, which stand for three equal channels. With
    `config={"in_channels": 1}` the stem's channels are summed into one, C is 1, and the outputs are the same.

    Args:
        path_or_state_dict: a file, or its content. Nothing in a file is executed.
        encoder: file or state dict of the Mammo-CLIP encoder, for checkpoints that were trained on stored features.
        config: words of the model section (see README), some or all, for what keys and shapes do not tell: `fpn` or
            `backbone_pyramid`, `mean_p` or `max_p`, heads, upsampling, probability map. Without it the published
            defaults are taken. The model's `report` (see msmil.models.published.report) names all of this.

    Raises:
        UserError: the file, the encoder or the config do not fit; one clear reason.
    """
    converted = convert(path_or_state_dict, encoder=encoder, config=config)
    model = converted.network
    if model is None:
        fix = "give a whole model, with this file as its encoder"
        raise UserError("holds an encoder alone, no whole model", file=converted.report.source, fix=fix)
    with torch.inference_mode(False):
        state = {key: _at_least_single(value) for key, value in converted.state.items()}
        model.load_state_dict(state, assign=True)
    model.report = converted.report  # type: ignore[assignment]
    if model.in_channels == 3:
        model.register_forward_pre_hook(_three_channels, with_kwargs=True)
    return model.eval()


def _at_least_single(value: Tensor) -> Tensor:
    single = value.is_floating_point() and value.dtype not in (torch.float32, torch.float64)
    return value.float() if single else value.clone()


def _three_channels(
    model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Grey tiles stand for three equal channels."""
    if arguments:
        return (_in_colour(arguments[0]), *arguments[1:]), named
    return arguments, {name: _in_colour(value) if "tiles" in name else value for name, value in named.items()}


def _in_colour(tiles: Any) -> Any:
    if isinstance(tiles, Mapping):
        return {size: _in_colour(part) for size, part in tiles.items()}
    return tiles.expand(-1, -1, 3, -1, -1) if tiles.dim() == 5 and tiles.shape[2] == 1 else tiles
