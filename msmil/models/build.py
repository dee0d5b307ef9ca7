"""From the model section of a configuration to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msmil.config import ModelConfig
from msmil.config_checks import PYRAMIDS
from msmil.models.attention import LabelLinear
from msmil.models.backbone import Backbone, build_backbone
from msmil.models.branch import ScaleBranch
from msmil.models.encoders import Encoder, MLPEncoder, SetEncoder
from msmil.models.mil import Layout, MILModel
from msmil.models.nested import RegionMIL
from msmil.models.pooling import AttentionPooling, MaxPooling, MeanPooling, Pooling
from msmil.models.pyramid import FeaturePyramid
from msmil.models.scales import ScaleAttention
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
        tile_hw: height and width of a tile in pixels; the padded image's in `image` mode. Where an instance is a tile,
            tiles are squares of the sizes in `scales` instead.
        tiles: tiles of an image; 1 in `image` mode.

    Raises:
        UserError: the backbone's (see `build_backbone`); a width that the heads do not divide.
    """
    _check_heads(config)
    backbone = _backbone(config, tile_hw)
    pyramid = _pyramid(config, backbone) if config.instance_encoder in PYRAMIDS else None
    in_dim = config.fpn_dim if pyramid is not None else backbone.channels[-1]
    points = _inducing_points(config, padded_hw=padded_hw, tile_hw=tile_hw, tiles=tiles)
    attentions = num_labels if config.attention == "per_label" else 1
    single = config.instance_encoder == "single"
    heads = config.deep_supervision and not single
    return MILModel(
        backbone=backbone,
        pyramid=pyramid,
        branches={
            scale: ScaleBranch(
                encoder=_encoder(config, config.mil_encoder, in_dim=in_dim, points=m),
                pooling=_pooling(config, config.pooling, attentions),
                head=LabelLinear(config.encoder_dim, num_labels, config.classifier_dropout) if heads else None,
            )
            for scale, m in zip(config.scales, points, strict=True)
        },
        region=_region(config, attentions, padded_hw=padded_hw, tile_hw=tile_hw, tiles=tiles)
        if config.nested
        else None,
        scale_attention=None if single else _scale_attention(config, attentions),
        classifier=_classifier(config, num_labels),
        aggregator=config.scale_aggregator,
        layout=_layout(config),
        in_channels=config.in_channels,
        num_labels=num_labels,
    )


def inducing_points(instances: int) -> int:
    """Inducing points for an image of n instances at one scale: ceil(10 log10 n), or n up to 10 (FPN-MIL)."""
    return math.ceil(10 * math.log10(instances)) if instances > 10 else instances


def _cells(hw: tuple[int, int], stride: int) -> int:
    return math.ceil(hw[0] / stride) * math.ceil(hw[1] / stride)


def _inducing_points(
    config: ModelConfig, *, padded_hw: tuple[int, int], tile_hw: tuple[int, int], tiles: int
) -> Sequence[int]:
    """Per scale. Overlapping tiles repeat pixels: an image has no more instances than its padded size holds, so the
    parameters keep their shapes when only the overlap changes. The sets of nested MIL are single tiles."""
    if config.inducing_points != "auto":
        return config.inducing_points
    if config.instance_encoder not in PYRAMIDS:
        return [inducing_points(_cells(padded_hw, size)) for size in config.scales]
    if config.nested:
        return [inducing_points(_cells(tile_hw, s)) for s in config.scales]
    return [inducing_points(min(tiles * _cells(tile_hw, s), _cells(padded_hw, s))) for s in config.scales]


def _layout(config: ModelConfig) -> Layout:
    if config.instance_encoder == "single":
        return "single"
    return "sizes" if config.instance_encoder == "msp" else "pyramid"


def _backbone(config: ModelConfig, tile_hw: tuple[int, int]) -> Backbone:
    pyramid = config.instance_encoder in PYRAMIDS
    return build_backbone(
        config.backbone,
        scales=config.scales if pyramid else None,
        in_channels=config.in_channels,
        tile_hw=tile_hw if pyramid else (config.scales[0], config.scales[0]),
        pretrained=config.pretrained,
        drop_path_rate=config.drop_path_rate,
        options=config.backbone_options,
    )


def _pyramid(config: ModelConfig, backbone: Backbone) -> FeaturePyramid:
    return FeaturePyramid(
        scales=config.scales,
        strides=backbone.strides,
        channels=backbone.channels,
        dim=config.fpn_dim,
        top_down=config.instance_encoder == "fpn",
        upsample=config.upsample,
        norm=config.pyramid_norm,
    )


def _encoder(config: ModelConfig, kind: str, *, in_dim: int, points: int) -> Encoder:
    dim, heads, layer_norm = config.encoder_dim, config.encoder_heads, config.encoder_layer_norm
    in_dims = [in_dim] + [dim] * (config.encoder_blocks - 1)
    if kind == "mlp":
        return MLPEncoder(in_dim=in_dim, dim=dim, dropout=config.encoder_dropout)
    if kind == "sab":
        return SetEncoder([SAB(in_dim=d, dim=dim, heads=heads, layer_norm=layer_norm) for d in in_dims])
    return SetEncoder([ISAB(in_dim=d, dim=dim, heads=heads, layer_norm=layer_norm, points=points) for d in in_dims])


def _pooling(config: ModelConfig, kind: str, attentions: int) -> Pooling:
    if kind in ("max", "mean"):
        return MaxPooling() if kind == "max" else MeanPooling()
    if kind == "pma":
        return PMA(
            dim=config.encoder_dim,
            heads=config.pma_heads,
            layer_norm=config.encoder_layer_norm,
            labels=attentions,
            probability=config.probability,
        )
    return AttentionPooling(
        dim=config.encoder_dim,
        hidden_dim=config.attention_dim,
        labels=attentions,
        gated=kind == "gated_attention",
        dropout=config.attention_dropout,
        probability=config.probability,
    )


def _region(
    config: ModelConfig, attentions: int, *, padded_hw: tuple[int, int], tile_hw: tuple[int, int], tiles: int
) -> RegionMIL:
    points = config.region_inducing_points
    if points == "auto":
        apart = math.ceil(padded_hw[0] / tile_hw[0]) * math.ceil(padded_hw[1] / tile_hw[1])
        points = inducing_points(min(tiles, apart))
    encoder = config.mil_encoder if config.region_mil_encoder == "same" else config.region_mil_encoder
    pooling = config.pooling if config.region_pooling == "same" else config.region_pooling
    return RegionMIL(
        encoder=_encoder(config, encoder, in_dim=config.encoder_dim, points=points),
        pooling=_pooling(config, pooling, attentions),
    )


def _scale_attention(config: ModelConfig, attentions: int) -> ScaleAttention | None:
    if config.scale_aggregator not in ("attention", "gated_attention"):
        return None
    return ScaleAttention(
        dim=config.encoder_dim,
        hidden_dim=config.attention_dim,
        labels=attentions,
        gated=config.scale_aggregator == "gated_attention",
        dropout=config.attention_dropout,
    )


def _classifier(config: ModelConfig, num_labels: int) -> LabelLinear | None:
    dim = config.encoder_dim
    if config.instance_encoder != "single":
        if config.scale_aggregator in ("mean_p", "max_p"):
            return None
        if config.scale_aggregator == "concatenation":
            dim *= len(config.scales)
    return LabelLinear(dim, num_labels, config.classifier_dropout)


def _check_heads(config: ModelConfig) -> None:
    encoders, poolings = {config.mil_encoder, config.region_mil_encoder}, {config.pooling, config.region_pooling}
    used = {"encoder_heads": bool(encoders & {"sab", "isab"}), "pma_heads": "pma" in poolings}
    for key, heads in (("encoder_heads", config.encoder_heads), ("pma_heads", config.pma_heads)):
        if used[key] and config.encoder_dim % heads:
            raise UserError(
                f"model.{key} is {heads}, which does not divide model.encoder_dim {config.encoder_dim}",
                fix=f"give a divisor of {config.encoder_dim}",
            )
