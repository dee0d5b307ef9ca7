"""A converted checkpoint on disk: model.safetensors, config.yaml and report.txt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from msmil.config import Config
from msmil.config_io import config_from_dict, dump_config
from msmil.models.published.convert import Converted, Source, convert
from msmil.models.published.words import PUBLISHED_BAGS
from msmil.models.weights import WEIGHTS_FILE
from shards.errors import UserError
from shards.files import atomic_file


def convert_to_folder(
    source: Source, folder: str | Path, *, encoder: Source | None = None, config: Mapping[str, Any] | None = None
) -> Converted:
    """Convert a published file and write it as a folder that `model.weights` and `msmil evaluate` take.

    Args:
        source, encoder: as `convert`.
        folder: is made; must not exist, or be empty.
        config: sections of an experiment for its config.yaml. Words of `model` are held against the keys; images have
            one channel unless model.in_channels says 3, and evaluation is in fp32 unless train.precision says another:
            only so the outputs are the published ones. A whole model needs data.labels: no file says what it was
            trained on, and the wrong label would give wrong numbers.

    Raises:
        UserError: as `convert`; the folder is not empty or cannot be written; not one label per output.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("exists and is not empty", file=target, fix="name a new folder")
    tree = dict(config or {})
    model = {"in_channels": 1, **tree.get("model", {})}
    converted = convert(source, encoder=encoder, config=model)
    text = dump_config(_experiment(converted, target, tree))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", file=target, fix="name another folder") from None
    state = {key: value.contiguous() for key, value in converted.state.items()}
    parts = {WEIGHTS_FILE: save(state), "report.txt": converted.report.text().encode(), "config.yaml": text.encode()}
    for name, content in parts.items():
        with atomic_file(target / name, needed_bytes=len(content)) as file:
            file.write(content)
    return converted


def _experiment(converted: Converted, folder: Path, tree: dict[str, Any]) -> Config:
    """The configuration beside the weights: the model's, the published bags, and what the user says."""
    model = dataclasses.asdict(converted.model)
    bags = {**PUBLISHED_BAGS, **tree.get("bags", {})}
    train = {"precision": "fp32", **tree.get("train", {})}
    data = dict(tree.get("data", {}))
    if converted.network is not None and "labels" not in data:
        fix = "name what it was trained on, in the order of the outputs, for example data.labels=[Mass]"
        thing = f"names no labels for its outputs ({converted.network.num_labels})"
        raise UserError(thing, file=converted.report.source, fix=fix)
    place = {"name": folder.resolve().name, "output_dir": str(folder.parent)}
    config = config_from_dict({**place, **tree, "model": model, "bags": bags, "data": data, "train": train})
    if converted.network is not None and len(config.data.labels) != converted.network.num_labels:
        thing = f"has {converted.network.num_labels} labels, data.labels names {list(config.data.labels)}"
        raise UserError(thing, file=converted.report.source, fix="name one label per output")
    return config
