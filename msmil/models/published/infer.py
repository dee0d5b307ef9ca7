"""What the keys and shapes of a published checkpoint tell about its architecture, in words of the model section."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from msmil.models.mammoclip import ENCODERS
from msmil.models.published.encoder_keys import encoder_name, encoder_prefix, stem_channels
from msmil.models.published.head_keys import PYRAMID_STRIDES
from msmil.models.published.reading import PublishedFile
from shards.errors import UserError

PYRAMID_SCALES: Final = (*PYRAMID_STRIDES, 128)
_SIDE = "side_inst_aggregator."
_LATERAL = "inst_encoder.inner_blocks.inner_block_{}.0.weight"
_WIDTHS = {120: "mammoclip_b2", 352: "mammoclip_b2", 176: "mammoclip_b5", 512: "mammoclip_b5"}


@dataclass
class Architecture:
    """Words of the model section.

    certain: {word: value}; open: {word: values that fit the keys equally, the published default first};
    free: {word: published default} where any value fits. encoder: prefix of the encoder's keys, None without one.
    """

    certain: dict[str, Any] = field(default_factory=dict)
    open: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    num_labels: int = 1
    encoder: str | None = None


def infer(file: PublishedFile) -> Architecture:
    """The architecture of a whole checkpoint, with or without its encoder.

    Raises:
        UserError: no checkpoint of this family; an encoder alone; scales in another order.
    """
    tensors = file.tensors
    found = Architecture(encoder=encoder_prefix(tensors))
    pyramid = _LATERAL.format(0) in tensors
    multi = any(key.startswith(f"{_SIDE}encoders.") for key in tensors)
    if not multi and not any(key.startswith("encoder.") for key in tensors):
        raise _foreign(file, found.encoder)
    scales = _scale_names(tensors) if multi else (256,)
    if pyramid:
        _check_levels(file, scales)
        _infer_pyramid(tensors, found)
    else:
        found.certain["instance_encoder"] = "msp" if multi else "single"
    if multi:
        found.certain["scales"] = scales
        first = f"{_SIDE}encoders.encoder_{scales[0]}.", f"{_SIDE}aggregators.aggregator_{scales[0]}."
    else:
        found.free["scales"] = scales
        first = "encoder.", "aggregator."
    encoder, pooling = _infer_encoder(file, first[0]), _infer_pooling(tensors, first[1])
    found.certain |= encoder.certain
    found.open |= pooling.open
    found.certain |= pooling.certain
    found.free |= encoder.free | pooling.free
    if encoder.certain["mil_encoder"] == "isab":
        names = [f"{_SIDE}encoders.encoder_{s}." for s in scales] if multi else ["encoder."]
        found.certain["inducing_points"] = tuple(_points(tensors, name) for name in names)
    if multi:
        _infer_scales(tensors, found, scales)
    _infer_region(file, found)
    _infer_backbone(file, found)
    rows = [value.shape[0] for key, value in tensors.items() if key.endswith("head_classifier.weight")]
    found.num_labels = rows[0] if rows else 1
    return found


def _foreign(file: PublishedFile, encoder: str | None) -> UserError:
    if encoder is not None:
        fix = "convert it with `msmil convert`, or name it as the encoder of a whole checkpoint"
        return UserError("holds an encoder alone, no whole model", file=file.name, fix=fix)
    names = ", ".join(list(file.tensors)[:3])
    fix = "give a checkpoint of FPN-MIL or of Mammo-CLIP (EfficientNet-B2 or B5)"
    return UserError(f"is of another architecture (its keys are {names}, ..)", file=file.name, fix=fix)


def _scale_names(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Names of the scales in the file's order; a file that sorts its keys has no order of its own: ascending."""
    matches = [re.match(rf"{re.escape(_SIDE)}encoders\.encoder_(\d+)\.", key) for key in tensors]
    names = tuple(dict.fromkeys(int(match[1]) for match in matches if match))
    return tuple(sorted(names)) if list(tensors) == sorted(tensors) else names


def _check_levels(file: PublishedFile, names: tuple[int, ...]) -> None:
    if names == PYRAMID_SCALES:
        return
    levels = ", ".join(map(str, PYRAMID_SCALES))
    thing = f"names its scales {', '.join(map(str, names))}, but the levels of its pyramid are by position {levels}"
    raise UserError(thing, file=file.name, fix=f"rename the scales in its keys to {levels}, in this order")


def _infer_pyramid(tensors: Mapping[str, Tensor], found: Architecture) -> None:
    found.open["instance_encoder"] = ("fpn", "backbone_pyramid")
    found.certain["fpn_dim"] = tensors[_LATERAL.format(0)].shape[0]
    found.certain["pyramid_norm"] = "inst_encoder.inner_blocks.inner_block_0.1.weight" in tensors
    found.free["upsample"] = "nearest"


def _infer_encoder(file: PublishedFile, prefix: str) -> Architecture:
    tensors, found = file.tensors, Architecture()
    blocks = {key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)}
    first = f"{prefix}0."
    if f"{first}0.weight" in tensors:
        found.certain = {"mil_encoder": "mlp", "encoder_dim": tensors[f"{first}0.weight"].shape[0]}
        return found
    kind, mab = ("isab", "mab0") if f"{first}I" in tensors else ("sab", "mab")
    query = tensors.get(f"{first}{mab}.fc_q.weight")
    if query is None:
        names = ", ".join(key for key in tensors if key.startswith(prefix))[:200]
        fix = "give a checkpoint of FPN-MIL with an mlp, sab or isab encoder"
        raise UserError(f"is of another architecture (its instance encoder has {names})", file=file.name, fix=fix)
    found.certain = {"mil_encoder": kind, "encoder_dim": query.shape[0], "encoder_blocks": len(blocks)}
    found.certain["encoder_layer_norm"] = f"{first}{mab}.ln0.weight" in tensors
    found.free["encoder_heads"] = 4
    return found


def _infer_pooling(tensors: Mapping[str, Tensor], prefix: str) -> Architecture:
    found = Architecture(free={"probability": "softmax"})
    hidden = tensors.get(f"{prefix}attention_V.0.weight")
    if f"{prefix}S" in tensors:
        found.certain = {"pooling": "pma", "encoder_layer_norm": f"{prefix}mab.ln0.weight" in tensors}
        found.free["pma_heads"] = 1
    elif hidden is not None:
        gated = f"{prefix}attention_U.0.weight" in tensors
        found.certain = {"pooling": "gated_attention" if gated else "attention", "attention_dim": hidden.shape[0]}
    else:
        found.open["pooling"] = ("mean", "max")
        found.free = {}
    return found


def _points(tensors: Mapping[str, Tensor], prefix: str) -> int:
    points = tensors.get(f"{prefix}0.I")
    return 0 if points is None else points.shape[1]


def _infer_scales(tensors: Mapping[str, Tensor], found: Architecture, scales: Sequence[int]) -> None:
    """Scale aggregator and side heads. Without a classifier only the side heads' probabilities are left to merge."""
    found.certain["deep_supervision"] = any(key.startswith("side_classifiers.") for key in tensors)
    hidden = tensors.get("scale_aggregator.attention_V.0.weight")
    classifier = tensors.get("classifier.head_classifier.weight")
    if hidden is not None:
        gated = "scale_aggregator.attention_U.0.weight" in tensors
        found.certain["scale_aggregator"] = "gated_attention" if gated else "attention"
        found.certain["attention_dim"] = hidden.shape[0]
    elif classifier is not None:
        found.certain["scale_aggregator"] = "concatenation"
    else:
        found.open["scale_aggregator"] = ("mean_p", "max_p")


def _infer_region(file: PublishedFile, found: Architecture) -> None:
    nested = any(key.startswith("region_aggregator.") for key in file.tensors)
    found.certain["nested"] = nested
    if not nested:
        return
    encoder = _infer_encoder(file, "region_aggregator.encoder.").certain["mil_encoder"]
    pooling = _infer_pooling(file.tensors, "region_aggregator.aggregator.")
    same = found.certain["mil_encoder"] == encoder
    found.open["region_mil_encoder"] = ("same", encoder) if same else (encoder,)
    kinds = pooling.open.get("pooling") or (pooling.certain["pooling"],)
    alike = kinds == (found.open.get("pooling") or (found.certain["pooling"],))
    found.open["region_pooling"] = ("same", *kinds) if alike else kinds
    if encoder == "isab":
        found.certain["region_inducing_points"] = _points(file.tensors, "region_aggregator.encoder.")


def _infer_backbone(file: PublishedFile, found: Architecture) -> None:
    """By its blocks; without an encoder in the file, by the width of the features that the model expects."""
    found.free["in_channels"], found.free["drop_path_rate"] = 3, 0.2
    if found.encoder is not None:
        found.certain["backbone"] = encoder_name(file.tensors, found.encoder, file.name)
        if stem_channels(file.tensors, found.encoder, file.name) == 1:
            del found.free["in_channels"]
            found.certain["in_channels"] = 1
        return
    width = _feature_width(file.tensors)
    if width not in _WIDTHS:
        known = ", ".join(f"{name} has {count}" for count, name in _WIDTHS.items())
        thing = f"expects features of {width} channels, which no published encoder has ({known})"
        raise UserError(thing, file=file.name, fix=f"give a checkpoint trained on one of {', '.join(ENCODERS)}")
    found.certain["backbone"] = _WIDTHS[width]


def _feature_width(tensors: Mapping[str, Tensor]) -> int:
    lateral = tensors.get(_LATERAL.format(0))
    if lateral is not None:
        return lateral.shape[1]
    first = re.compile(rf"(?:{re.escape(_SIDE)}encoders\.encoder_\d+|encoder)\.0\.(?:0|mab0\.fc_k|mab\.fc_k)\.weight")
    return next((value.shape[1] for key, value in tensors.items() if first.fullmatch(key)), 0)
