"""From the model section of a configuration to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msmil.config import ModelConfig
from msmil.models.attention import AttentionPooling, LabelLinear, ScaleAttention
from msmil.models.backbone import build_backbone
from msmil.models.mil import MILModel, MLPEncoder, ScaleBranch, SetEncoder
from msmil.models.pyramid import FeaturePyramid
from msmil.models.set_transformer import ISAB, PMA, SAB
from shards.errors import UserError


def build_model(
    config: ModelConfig, *, num_labels: int, padded_hw: tuple[int, int], tile_hw: tuple[int, int], tiles: int
) -> MILModel:
    """The network of a configuration, randomly initialised (or with timm's weights in the backbone).

    Args:
        config: the model section.
        num_labels: K.
        padded_hw: height and width of the padded image in pixels.
        tile_hw: height and width of a tile in pixels; the padded image's in `image` mode.
        tiles: tiles of an image; 1 in `image` mode.

    Raises:
        UserError: the backbone's (see `build_backbone`); a width that the heads do not divide.
    """
    _check_heads(config)
    backbone = build_backbone(
        config.backbone,
        scales=config.scales,
        in_channels=config.in_channels,
        tile_hw=tile_hw,
        pretrained=config.pretrained,
        drop_path_rate=config.drop_path_rate,
        options=config.backbone_options,
    )
    pyramid = FeaturePyramid(
        scales=config.scales, strides=backbone.strides, channels=backbone.channels, dim=config.fpn_dim
    )
    points = _inducing_points(config, padded_hw=padded_hw, tile_hw=tile_hw, tiles=tiles)
    attentions = num_labels if config.attention == "per_label" else 1
    return MILModel(
        backbone=backbone,
        pyramid=pyramid,
        branches={
            scale: _branch(config, num_labels=num_labels, attentions=attentions, points=m)
            for scale, m in zip(config.scales, points, strict=True)
        },
        scale_attention=ScaleAttention(
            dim=config.encoder_dim,
            hidden_dim=config.attention_dim,
            labels=attentions,
            dropout=config.attention_dropout,
        ),
        classifier=LabelLinear(config.encoder_dim, num_labels, config.classifier_dropout),
        in_channels=config.in_channels,
        num_labels=num_labels,
    )


def inducing_points(instances: int) -> int:
    """Inducing points for an image of n instances at one scale: ceil(10 log10 n), or n up to 10 (FPN-MIL)."""
    return math.ceil(10 * math.log10(instances)) if instances > 10 else instances


def _inducing_points(
    config: ModelConfig, *, padded_hw: tuple[int, int], tile_hw: tuple[int, int], tiles: int
) -> Sequence[int]:
    """Per scale. Overlapping tiles repeat pixels: an image has no more instances than its padded size holds, so the
    parameters keep their shapes when only the overlap changes."""
    if config.inducing_points != "auto":
        return config.inducing_points

    def cells(hw: tuple[int, int], stride: int) -> int:
        return math.ceil(hw[0] / stride) * math.ceil(hw[1] / stride)

    return [inducing_points(min(tiles * cells(tile_hw, s), cells(padded_hw, s))) for s in config.scales]


def _branch(config: ModelConfig, *, num_labels: int, attentions: int, points: int) -> ScaleBranch:
    dim = config.encoder_dim
    return ScaleBranch(
        encoder=_encoder(config, points),
        pooling=PMA(dim=dim, heads=config.pma_heads, layer_norm=config.encoder_layer_norm, labels=attentions)
        if config.pooling == "pma"
        else AttentionPooling(
            dim=dim,
            hidden_dim=config.attention_dim,
            labels=attentions,
            gated=config.pooling == "gated_attention",
            dropout=config.attention_dropout,
        ),
        head=LabelLinear(dim, num_labels, config.classifier_dropout) if config.deep_supervision else None,
    )


def _encoder(config: ModelConfig, points: int) -> MLPEncoder | SetEncoder:
    dim, heads, layer_norm = config.encoder_dim, config.encoder_heads, config.encoder_layer_norm
    in_dims = [config.fpn_dim] + [dim] * (config.encoder_blocks - 1)
    if config.mil_encoder == "mlp":
        return MLPEncoder(in_dim=config.fpn_dim, dim=dim, dropout=config.encoder_dropout)
    if config.mil_encoder == "sab":
        return SetEncoder([SAB(in_dim=d, dim=dim, heads=heads, layer_norm=layer_norm) for d in in_dims])
    return SetEncoder([ISAB(in_dim=d, dim=dim, heads=heads, layer_norm=layer_norm, points=points) for d in in_dims])


def _check_heads(config: ModelConfig) -> None:
    used = {"encoder_heads": config.mil_encoder in ("sab", "isab"), "pma_heads": config.pooling == "pma"}
    for key, heads in (("encoder_heads", config.encoder_heads), ("pma_heads", config.pma_heads)):
        if used[key] and config.encoder_dim % heads:
            raise UserError(
                f"model.{key} is {heads}, which does not divide model.encoder_dim {config.encoder_dim}",
                fix=f"give a divisor of {config.encoder_dim}",
            )
