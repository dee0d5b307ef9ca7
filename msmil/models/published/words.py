"""From what a checkpoint tells, and what its user says, to a whole model section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msmil.config import ModelConfig
from msmil.config_io import config_from_dict
from msmil.models.published.infer import Architecture
from msmil.models.published.report import Report
from shards.errors import UserError

# images in black-padded tiles of 512 pixels without overlap
PUBLISHED_BAGS: Final = {"instances": "tiles", "tile_size_px": 512, "tile_overlap": 0.0}
_UNSET = {"inducing_points": "auto", "region_inducing_points": "auto", "weights": "", "pretrained": False}


def model_section(found: Architecture, config: Mapping[str, Any] | None, report: Report) -> ModelConfig:
    """The configuration of the model: what the keys tell, then what `config` says, then the published defaults.

    Args:
        found: what the keys tell.
        config: words of the model section, some or all; None for none.
        report: gets what was inferred and what was assumed.

    Raises:
        UserError: `config` contradicts the keys (both are named), or has an unknown word or value.
    """
    said = {word: value for word, value in (config or {}).items() if _UNSET.get(word, ...) != value}
    for word in ("weights", "pretrained"):
        if word in said:
            fix = "leave it out: the weights are those of the file"
            raise UserError(f"config says {word}: {said[word]!r}", file=report.source, fix=fix)
    words = dict(found.certain)
    for word, value in found.certain.items():
        if word in said and _plain(said[word]) != _plain(value):
            raise _contradiction(report.source, word, said[word], repr(_plain(value)))
    for word, values in found.open.items():
        if word in said and said[word] not in values:
            raise _contradiction(report.source, word, said[word], " or ".join(map(repr, values)))
    report.inferred = dict(found.certain)
    defaults = {word: values[0] for word, values in found.open.items()} | found.free
    report.assumed = {word: value for word, value in defaults.items() if word not in said}
    words = {**defaults, **said, **words}
    said_of_model = {word: _plain(value) for word, value in words.items()}
    return config_from_dict({"bags": PUBLISHED_BAGS, "model": said_of_model}).model


def _contradiction(source: str, word: str, said: object, keys: str) -> UserError:
    fix = f"leave {word} out of the config, or give the file that it belongs to"
    return UserError(f"config says {word}: {said!r}, the keys say {keys}", file=source, fix=fix)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
