"""timm's models as extractors of features: which maps they offer, and errors in the words of our options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from shards.errors import UserError


def level_indices(name: str, feature_info: Any, scales: Sequence[int]) -> tuple[int, ...]:
    """Feature indices of the wanted strides; where several maps share a stride, the deepest."""
    count = len(feature_info.info)
    offered = dict(zip(feature_info.reduction(), (i % count for i in feature_info.out_indices), strict=True))
    coarsest = max(offered)
    levels = [s for s in scales if s <= coarsest]
    missing = [s for s in levels if s not in offered]
    if missing or not levels:
        raise UserError(
            f"model.scales asks for strides {missing or list(scales)}, "
            f"but backbone {name!r} has the strides {sorted(offered)}",
            fix=f"take scales from {sorted(offered)} and at most coarser ones beside them, or choose another backbone",
        )
    return tuple(offered[s] for s in levels)


def with_drop_path(name: str, arguments: dict[str, Any], rate: float) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its arguments with the drop-path rate where it has one."""
    with_rate = {**arguments, "drop_path_rate": rate}
    try:
        return create(name, with_rate), with_rate
    except UserError as error:
        if "drop_path_rate" not in error.thing:
            raise
        if rate > 0:
            raise UserError(
                f"model.drop_path_rate is {rate}, but backbone {name!r} has no stochastic depth",
                fix="set model.drop_path_rate: 0.0",
            ) from error
    return create(name, arguments), arguments


def create(name: str, arguments: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """timm.create_model, its errors as UserError."""
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise UserError(
            f"backbone {name!r} does not take the options given: {first_line(error)}",
            fix="correct model.backbone_options; they are arguments of timm.create_model",
        ) from error
    except Exception as error:  # timm, the hub and its transport each raise their own kinds
        if pretrained:
            raise UserError(
                f"the pretrained weights of {name!r} could not be loaded ({type(error).__name__}: {first_line(error)})",
                fix="connect to huggingface.co, fill its cache (HF_HOME) on a machine that is, "
                "or set model.pretrained: false",
            ) from error
        raise UserError(
            f"timm cannot build {name!r} as a feature extractor ({type(error).__name__}: {first_line(error)})",
            fix="choose a backbone that supports features_only, or correct model.backbone_options",
        ) from error
    return net


def drop_unused_stages(net: nn.Module) -> None:
    """EfficientNet-like extractors build stages behind the last wanted map: take them off."""
    last: dict[str, Any] = net.feature_info.get_dicts()[-1]  # type: ignore[union-attr, operator]
    blocks = getattr(net, "blocks", None)
    if isinstance(blocks, nn.Sequential) and "stage" in last:
        net.blocks = blocks[: last["stage"]]


def first_line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
