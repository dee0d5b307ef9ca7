"""Names of the published pyramid and MIL layers -> ours.

<s> is a scale: a stride of the pyramid, or a tile size in pixels. A single-scale model names none: it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msmil.models.published.report import Report
from shards.errors import UserError

PYRAMID_STRIDES = (16, 32)  # levels of the published pyramid with weights; the third, 128, is a subsampling

_RULES = (
    (r"inst_encoder\.inner_blocks\.inner_block_(\d+)\.0\.", "pyramid.lateral.<{0}>."),
    (r"inst_encoder\.layer_blocks\.layer_block_(\d+)\.0\.", "pyramid.refine.<{0}>."),
    (r"inst_encoder\.(?:inner|layer)_blocks\.(?:inner|layer)_block_\d+\.1\.", "pyramid.norm."),
    (r"side_inst_aggregator\.encoders\.encoder_(\d+)\.", "branches.{0}.encoder."),
    (r"side_inst_aggregator\.aggregators\.aggregator_(\d+)\.", "branches.{0}.pooling."),
    (r"side_classifiers\.classifier_(\d+)\.head_classifier\.", "branches.{0}.head."),
    (r"region_aggregator\.encoder\.", "region.encoder."),
    (r"region_aggregator\.aggregator\.", "region.pooling."),
    (r"scale_aggregator\.", "scale_attention."),
    (r"classifier\.head_classifier\.", "classifier."),
    (r"encoder\.", "branches.<scale>.encoder."),
    (r"aggregator\.", "branches.<scale>.pooling."),
)
_LAYERS = (
    (r"encoder\.0\.0\.(weight|bias)$", r"encoder.linear.\1"),
    (r"encoder\.(\d+)\.(I|mab)", r"encoder.blocks.\1.\2"),
    (r"\.I$", ".inducing_1MD"),
    (r"\.S$", ".seed_1KD"),
    (r"attention_V\.0\.", "hidden.value."),
    (r"attention_U\.0\.", "hidden.gate."),
    (r"attention_weights\.", "score."),
)


def convert_head(tensors: Mapping[str, Tensor], scales: Sequence[int], report: Report) -> dict[str, Tensor]:
    """All but the encoder's tensors under our names; an unknown name stays as it is, and will be unexpected.

    Raises:
        UserError: the copies of the pyramid's shared norm are not equal.
    """
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        ours = our_name(key, scales)
        if ours in state:
            if not torch.equal(state[ours], value):
                fix = "give the file as published: one norm, which all four convolutions of the pyramid share"
                raise UserError(f"{key} differs from {report.loaded[ours][0]}", file=report.source, fix=fix)
            report.unused[key] = (tuple(value.shape), f"a copy of {report.loaded[ours][0]}, which the model shares")
            continue
        state[ours] = value
        report.loaded[ours] = (key, tuple(value.shape))
    return state


def our_name(key: str, scales: Sequence[int]) -> str:
    """Our name of a published key; level i of the pyramid is the i-th stride."""
    for pattern, template in _RULES:
        match = re.match(pattern, key)
        if match is None:
            continue
        name = template.format(*match.groups()).replace("<scale>", str(scales[0]))
        for level, stride in enumerate(PYRAMID_STRIDES):
            name = name.replace(f"<{level}>", str(stride))
        name += key[match.end() :]
        for layer, ours in _LAYERS:
            name = re.sub(layer, ours, name)
        return name
    return key
