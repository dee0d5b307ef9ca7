"""Weights to start from (`model.weights`): a folder that `msmil convert` wrote, or a checkpoint of a run.

Such a folder holds model.safetensors and, for what shapes do not tell, the config.yaml it was made with.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from msmil.config import ModelConfig
from msmil.config_io import load_config
from msmil.models.mammoclip import ENCODERS
from shards.errors import UserError

WEIGHTS_FILE: Final = "model.safetensors"
_ENCODER = ("backbone", "backbone_options", "in_channels")
_TRAINING = frozenset(  # how weights are trained, or what their shapes tell
    {"weights", "pretrained", "drop_path_rate", "encoder_dropout", "attention_dropout", "classifier_dropout"}
    | {"inducing_points", "region_inducing_points", "attention"}
)


@dataclass(frozen=True)
class StartWeights:
    """What `model.weights` names: the file and its {key: shape}.

    behind: keys of an encoder's last stages, where the wanted strides end before them.
    """

    file: Path
    shapes: dict[str, tuple[int, ...]]
    behind: tuple[str, ...] = ()

    @property
    def encoder_alone(self) -> bool:
        """Whether the MIL layers are left to chance."""
        return all(key.startswith("backbone.") for key in self.shapes)

    def text(self) -> str:
        """One line for the log."""
        what = "the encoder (the pyramid and MIL layers start at random)" if self.encoder_alone else "the whole model"
        behind = f"; {len(self.behind)} tensors behind the last map are not used" if self.behind else ""
        return f"starting from {self.file}: {what}, {len(self.shapes) - len(self.behind)} tensors{behind}"


def check_weights(model: ModelConfig, network: nn.Module) -> StartWeights:
    """Hold `model.weights` against the model that is to start from it; reads no numbers.

    Raises:
        UserError: no such folder or file; made with other words of the model section; a key that is missing, left over
            or of another shape. A file of the backbone alone must fit the backbone.
    """
    path = Path(model.weights)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if model.pretrained:
        raise UserError("model.pretrained and model.weights are both set", fix="set model.pretrained: false")
    try:
        with safe_open(file, "pt") as content:
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fix = "name a folder that `msmil convert` wrote (a published file is converted first)"
        raise UserError(f"model.weights cannot be read ({error})", file=file, fix=fix) from None
    weights = StartWeights(file, shapes)
    _check_words(model, weights)
    expected = {
        key: tuple(value.shape)
        for key, value in network.state_dict().items()
        if not weights.encoder_alone or key.startswith("backbone.")
    }
    behind = _behind(shapes, expected) if weights.encoder_alone else ()
    wrong = [
        f"{key} {_shape(shapes.get(key))} where the model has {_shape(expected.get(key))}"
        for key in sorted(expected.keys() | shapes.keys())
        if shapes.get(key) != expected.get(key) and key not in behind
    ]
    if wrong:
        fix = "set the model section and data.labels as in the config.yaml beside it"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"model.weights does not fit the model: {'; '.join(wrong[:3])}{more}", file=file, fix=fix)
    return replace(weights, behind=behind)


def load_weights(model: ModelConfig, network: nn.Module) -> StartWeights:
    """Load `model.weights` into a model: every key of it, but for stages behind the last wanted map.

    Raises:
        UserError: as check_weights.
    """
    weights = check_weights(model, network)
    state = {key: value for key, value in load_file(weights.file).items() if key not in weights.behind}
    report = network.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert weights.encoder_alone or not report.missing_keys
    return weights


def _behind(shapes: Mapping[str, object], expected: Mapping[str, object]) -> tuple[str, ...]:
    """Keys of whole stages that the model does not have."""
    stage = re.compile(r"backbone\.net\.blocks\.(\d+)\.")
    has = {match[1] for key in expected if (match := stage.match(key))}
    return tuple(key for key in shapes if (match := stage.match(key)) and match[1] not in has)


def _check_words(model: ModelConfig, weights: StartWeights) -> None:
    config = weights.file.parent / "config.yaml"
    if not config.is_file():
        fix = "keep the folder that `msmil convert` wrote together"
        raise UserError("model.weights has no config.yaml beside it", file=weights.file, fix=fix)
    theirs, ours = _words(load_config(config).model), _words(model)
    words = _ENCODER if weights.encoder_alone else tuple(word for word in ours if word not in _TRAINING)
    differing = {word: (theirs[word], ours[word]) for word in words if theirs[word] != ours[word]}
    if differing:
        said = "; ".join(f"model.{word} is {a!r} there and {b!r} here" for word, (a, b) in differing.items())
        fix = "set " + ", ".join(f"model.{word}={_yaml(a)}" for word, (a, _) in differing.items())
        raise UserError(f"model.weights was made with another model ({said})", file=weights.file, fix=fix)


def _words(model: ModelConfig) -> dict[str, Any]:
    """The model section; options that a published encoder has anyway may be said or not."""
    encoder = ENCODERS.get(model.backbone)
    own = {} if encoder is None else encoder.options
    return {**dataclasses.asdict(model), "backbone_options": {**own, **model.backbone_options}}


def _yaml(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
