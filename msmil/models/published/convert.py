"""Published checkpoints -> our state dicts: an encoder alone, or a whole model with or beside its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmil.config import ModelConfig
from msmil.models.backbone import Backbone, build_backbone
from msmil.models.build import build_model
from msmil.models.mammoclip import ENCODERS
from msmil.models.mil import MILModel
from msmil.models.published.encoder_keys import convert_encoder, encoder_name, encoder_prefix, stem_channels
from msmil.models.published.head_keys import convert_head
from msmil.models.published.infer import Architecture, infer
from msmil.models.published.reading import PublishedFile, read_published
from msmil.models.published.report import Report
from msmil.models.published.words import model_section
from shards.errors import UserError

Source = str | Path | Mapping[str, Any]
_TILE_HW = (512, 512)  # of the published pyramid; single and msp models have the size of their tiles
_PADDED_HW = (1536, 1024)
_TILES = 6


@dataclass(frozen=True)
class Converted:
    """Tensors under our names, the model section they belong to, and the account of how they came about.

    network: the model they fit, on the meta device (shapes, no numbers); None for an encoder alone.
    backbone: likewise, of the model, or alone.
    """

    state: dict[str, Tensor]
    model: ModelConfig
    backbone: Backbone
    network: MILModel | None
    report: Report


def convert(source: Source, *, encoder: Source | None = None, config: Mapping[str, Any] | None = None) -> Converted:
    """Convert a file of Mammo-CLIP (an encoder alone) or of FPN-MIL (a whole model).

    Args:
        source: a file, or its content.
        encoder: where the encoder is, for a whole model that was trained on stored features.
        config: words of the model section, for what keys and shapes do not tell, or to be held against them.

    Raises:
        UserError: as read_published, infer and model_section; tensors that are missing, left over or of another shape;
            an encoder where there is one already, or none where it is needed.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _convert(read_published(source), encoder, config)


def _convert(file: PublishedFile, encoder: Source | None, config: Mapping[str, Any] | None) -> Converted:
    if any(key.startswith("image_encoder.") for key in file.tensors) or "_conv_stem.weight" in file.tensors:
        if encoder is not None:
            fix = "name the whole model first, and the encoder beside it"
            raise UserError("holds an encoder itself, and another one is named", file=file.name, fix=fix)
        return _convert_encoder_alone(file, config)
    return _convert_whole(file, encoder, config)


def _convert_encoder_alone(file: PublishedFile, config: Mapping[str, Any] | None) -> Converted:
    prefix = encoder_prefix(file.tensors)
    report = Report(file.name)
    if prefix is None:
        names = ", ".join([key for key in file.tensors if key.startswith("image_encoder.")][:3])
        fix = f"give one of Mammo-CLIP's EfficientNets ({', '.join(ENCODERS)})"
        raise UserError(f"is of another architecture (its encoder has {names}, ..)", file=file.name, fix=fix)
    found = Architecture(free={"in_channels": 3, "drop_path_rate": 0.2}, encoder=prefix)
    found.certain["backbone"] = encoder_name(file.tensors, prefix, file.name)
    if stem_channels(file.tensors, prefix, file.name) == 1:
        del found.free["in_channels"]
        found.certain["in_channels"] = 1
    model = model_section(found, config, report)
    state = _encoder_state(file, prefix, model, report)
    _name_others(file, prefix, report)
    with torch.device("meta"):
        backbone = build_backbone(
            model.backbone,
            scales=(16, 32),
            in_channels=model.in_channels,
            tile_hw=_TILE_HW,
            options=model.backbone_options,
        )
    report.check(state, {f"backbone.{key}": value for key, value in backbone.state_dict().items()})
    return Converted(state, model, backbone, None, report)


def _convert_whole(file: PublishedFile, encoder: Source | None, config: Mapping[str, Any] | None) -> Converted:
    found, report = infer(file), Report(file.name)
    if found.encoder is not None and encoder is not None:
        fix = "leave the other encoder out, or take this one's keys out of the file"
        raise UserError("holds its own encoder, and another one is named", file=file.name, fix=fix)
    if found.encoder is None and encoder is None:
        fix = f"name the file of the encoder it was trained on ({found.certain['backbone']}): encoder=, or --encoder"
        raise UserError("holds no encoder (it was trained on stored features)", file=file.name, fix=fix)
    model = model_section(found, config, report)
    if encoder is None:
        assert found.encoder is not None
        state = _encoder_state(file, found.encoder, model, report)
        own = {key: value for key, value in file.tensors.items() if not key.startswith(found.encoder)}
    else:
        state = _beside(read_published(encoder), model, report)
        own = file.tensors
    state |= convert_head(own, model.scales, report)
    with torch.device("meta"):
        network = build_model(model, num_labels=found.num_labels, padded_hw=_PADDED_HW, tile_hw=_TILE_HW, tiles=_TILES)
    report.check(state, network.state_dict())
    return Converted(state, model, network.backbone, network, report)


def _beside(file: PublishedFile, model: ModelConfig, report: Report) -> dict[str, Tensor]:
    """The encoder of another file, for a model that expects `model.backbone`."""
    prefix = encoder_prefix(file.tensors)
    if prefix is None:
        fix = "name a checkpoint of Mammo-CLIP, or a state dict of its encoder"
        raise UserError("is named as the encoder, but holds none of this family", file=file.name, fix=fix)
    name = encoder_name(file.tensors, prefix, file.name)
    if name != model.backbone:
        fix = f"name the encoder that it was trained on, a {model.backbone}"
        raise UserError(f"is a {name}, but {report.source} expects a {model.backbone}", file=file.name, fix=fix)
    report.source += f" with the encoder of {file.name}"
    _name_others(file, prefix, report)
    return _encoder_state(file, prefix, model, report)


def _encoder_state(file: PublishedFile, prefix: str, model: ModelConfig, report: Report) -> dict[str, Tensor]:
    channels = stem_channels(file.tensors, prefix, file.name)
    if model.in_channels > channels:
        fix = f"set in_channels: {channels}"
        thing = f"the encoder's stem takes {channels} channels, config says in_channels: {model.in_channels}"
        raise UserError(thing, file=file.name, fix=fix)
    return convert_encoder(file.tensors, prefix, name=model.backbone, in_channels=model.in_channels, report=report)


def _name_others(file: PublishedFile, prefix: str, report: Report) -> None:
    """What a file of an encoder holds beside it (Mammo-CLIP: the text encoder, projections)."""
    for key, value in file.tensors.items():
        if not key.startswith(prefix):
            report.unused[key] = (tuple(value.shape), "no part of the image encoder")
