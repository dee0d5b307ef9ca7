"""Mammo-CLIP's image encoder -> our backbone: names, and the stem for grey images.

Key rule: EfficientNet in the layout of `efficientnet_pytorch` (blocks counted over all stages) to timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from msmil.models.mammoclip import ENCODERS
from msmil.models.published.report import Report
from shards.errors import UserError

STEM = "_conv_stem.weight"
_PREFIXES = ("image_encoder.", "inst_encoder.backbone.", "inst_encoder.", "")
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_SHARED = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_FIRST_STAGE = {**_SHARED, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {
    **_SHARED,
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_HEAD = ("_conv_head.", "_bn1.", "_fc.")


def encoder_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the encoder's keys in a file; None where it holds no encoder of this family."""
    return next((prefix for prefix in _PREFIXES if prefix + STEM in tensors), None)


def encoder_name(tensors: Mapping[str, Tensor], prefix: str, source: str) -> str:
    """Which of the published encoders the keys are, by their number of blocks.

    Raises:
        UserError: another EfficientNet.
    """
    pattern = re.compile(re.escape(prefix) + r"_blocks\.(\d+)\.")
    blocks = len({match[1] for key in tensors if (match := pattern.match(key))})
    known = {sum(encoder.stage_lengths): name for name, encoder in ENCODERS.items()}
    if blocks not in known:
        offered = ", ".join(f"{name} has {count}" for count, name in known.items())
        fix = "give the checkpoint of an EfficientNet-B2 or B5"
        raise UserError(f"the encoder has {blocks} blocks ({offered})", file=source, fix=fix)
    return known[blocks]


def stem_channels(tensors: Mapping[str, Tensor], prefix: str, source: str) -> int:
    """Input channels of an encoder.

    Raises:
        UserError: neither colour nor grey.
    """
    shape = tuple(tensors[prefix + STEM].shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        fix = "give a checkpoint of an encoder of 3 channels, or of 1"
        raise UserError(f"the stem {prefix + STEM} has shape {shape}", file=source, fix=fix)
    return shape[1]


def convert_encoder(
    tensors: Mapping[str, Tensor], prefix: str, *, name: str, in_channels: int, report: Report
) -> dict[str, Tensor]:
    """The encoder's tensors under our names; what lies behind its last map is unused, and named.

    With one input channel the stem's three are summed: the image's three were equal, so the outputs stay the same.
    """
    state: dict[str, Tensor] = {}
    lengths = ENCODERS[name].stage_lengths
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        inner = key.removeprefix(prefix)
        if inner.startswith(_HEAD):
            report.unused[key] = (tuple(value.shape), "the head behind the encoder's last map")
            continue
        ours = f"backbone.net.{_our_name(inner, lengths)}"
        report.loaded[ours] = (key, tuple(value.shape))
        state[ours] = value
        if inner == STEM and in_channels == 1 and value.shape[1] != 1:
            state[ours] = value.sum(1, keepdim=True)
            report.converted[ours] = "three channels summed into one"
    return state


def _our_name(key: str, lengths: tuple[int, ...]) -> str:
    """timm's name of an encoder's tensor; an unknown name stays as it is, and will be unexpected."""
    parts = key.split(".")
    if parts[0] in _OUTSIDE:
        return ".".join([_OUTSIDE[parts[0]], *parts[1:]])
    if parts[0] != "_blocks" or len(parts) < 4 or not parts[1].isdigit():
        return key
    stage, index = 0, int(parts[1])
    while stage < len(lengths) - 1 and index >= lengths[stage]:
        index -= lengths[stage]
        stage += 1
    names = _FIRST_STAGE if stage == 0 else _LATER_STAGES
    if parts[2] not in names:
        return key
    return ".".join(["blocks", str(stage), str(index), names[parts[2]], *parts[3:]])
