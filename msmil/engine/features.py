"""What stored features are features of: encoder, tiling, data. Training from them is refused where one differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import nn

from msmil.config import BagConfig, Config, ModelConfig
from msmil.engine.data import remote_options
from msmil.models.mil import MILModel
from shards.errors import UserError
from shards.features import Features, read_features
from shards.manifest import MANIFEST_NAME, Manifest

# What of the model section decides what the encoder computes, beside its weights.
_ENCODER_KEYS: Final = ("backbone", "backbone_options", "in_channels")
_OTHER_MODE: Final = {"image": ("tile_size_px", "tile_overlap"), "tiles": ("pad_multiple_px",)}
_SHOWN: Final = 12  # characters of a digest in a message


def encoder_identity(config: ModelConfig, backbone: nn.Module) -> dict[str, Any]:
    """The encoder's words, and a SHA-256 over them and its weights: name, type, shape and bytes, in order of names."""
    words = _encoder_words(config)
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {**words, "sha256": digest.hexdigest()}


def tiling_identity(config: BagConfig) -> dict[str, Any]:
    """How an image becomes what the encoder sees: the options of `bags` that have a say, but not augmentation."""
    words = asdict(config)
    silent = ["augment", *_OTHER_MODE[config.instances]]
    if config.local_contrast == 0:
        silent.append("local_contrast_sigma_px")
    return {key: value for key, value in words.items() if key not in silent}


def open_features(config: Config, manifest: Manifest) -> Features | None:
    """The features that a configuration names, checked against its data, tiling and encoder; None where it names none.

    The encoder's weights are checked by `check_encoder`, once there is a network.

    Raises:
        UserError: as read_features; made of other data, with another tiling or encoder: both values are named.
    """
    if not config.data.features:
        return None
    features = read_features(config.data.features, remote_options(config))
    header = features.header
    before, now = header.data["fingerprint"], manifest.header.fingerprint
    if before != now:
        thing = f"features of data with fingerprint {before[:_SHOWN]}, data.shards has {now[:_SHOWN]}"
        raise _refusal(features, thing, "give the shards that were encoded, or features of these data (msmil extract)")
    _compare(features, "bags", header.bags, tiling_identity(config.bags))
    _compare(features, "model", header.encoder, _encoder_words(config.model))
    assert len(features) == len(manifest), "the fingerprint holds the rows together"
    return features


def choose_levels(features: Features, network: MILModel) -> Features:
    """The features with the levels that a network needs.

    Raises:
        UserError: one was not stored.
    """
    missing = [level for level in network.levels if level not in features.levels]
    if missing:
        thing = f"features of the levels {list(features.levels)}, the model needs {missing} too"
        raise _refusal(features, thing, "extract with these model.scales, or choose scales among those stored")
    return features.only(tuple(network.levels))


def check_encoder(features: Features, config: ModelConfig, network: MILModel) -> None:
    """Refuse a network whose encoder has other weights than the one that made the features.

    Raises:
        UserError: both digests are named.
    """
    before, now = features.header.encoder["sha256"], encoder_identity(config, network.backbone)["sha256"]
    if before != now:
        thing = f"features of an encoder with digest {before[:_SHOWN]}, this one's weights have {now[:_SHOWN]}"
        fix = "give the weights, or the seed that drew them, as in the extraction; or extract with this encoder"
        raise _refusal(features, thing, fix)


def _encoder_words(config: ModelConfig) -> dict[str, Any]:
    words: dict[str, Any] = json.loads(json.dumps({key: getattr(config, key) for key in _ENCODER_KEYS}, default=list))
    return words


def _compare(features: Features, section: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted(now.keys() | before.keys() - {"sha256"}):
        if before.get(key) != now.get(key):
            thing = f"features made with {section}.{key} {before.get(key)!r}, it is {now.get(key)!r} now"
            raise _refusal(features, thing, f"set {section}.{key} as it was, or extract again")


def _refusal(features: Features, thing: str, fix: str) -> UserError:
    return UserError(f"holds {thing}", fix=fix, file=f"{features.where}/{MANIFEST_NAME}")
