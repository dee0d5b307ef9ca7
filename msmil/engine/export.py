"""A run's weights for others: safetensors with the configuration, and on request the graph of inference.

The folder is one that `model.weights`, `msmil evaluate` and `msmil extract` start from, like one of `msmil convert`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from torch import Tensor

import msmil
from msmil.config import Config
from msmil.config_io import dump_config, load_config
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import metric_of
from msmil.engine.evaluate import evaluated_weights, fill, find_checkpoint
from msmil.engine.export_graph import (
    WRITERS,
    Format,
    InferenceGraph,
    StoredImages,
    check_available,
    describe,
    written_and_verified,
)
from msmil.engine.pipeline import build_network
from msmil.engine.run_folder import RunFolder
from msmil.models.weights import WEIGHTS_FILE
from shards.errors import UserError
from shards.files import atomic_folder
from shards.manifest import read_manifest

ABOUT_NAME: Final = "export.json"
_VERSION: Final = 1
_FREE_SPACE_FACTOR: Final = 1.1


def export(
    folder: RunFolder, out: Path, *, checkpoint: str, formats: Sequence[Format], shards: str | None
) -> dict[str, Any]:
    """Write model.safetensors, config.yaml, export.json and a graph per format, and return what export.json says.

    Args:
        folder: a run, or weights of `msmil convert`.
        out: is made; an export that is there already is replaced.
        checkpoint: `best`, `latest`, or the name of a folder such as step_00000880.
        formats: of the graphs.
        shards: packed data whose image size and type the graphs take; None: those that the run was trained on.

    Raises:
        UserError: no such checkpoint; `out` holds something else; the size of images is not known; the graph cannot
            be expressed in a format, or does not give what the model gives.
    """
    _refuse_foreign(out)
    check_available(formats)
    found = find_checkpoint(folder, checkpoint, other_data=True)
    config = load_config(found / "config.yaml")
    weights, about = _weights(found) if found != folder.root else (load_file(found / WEIGHTS_FILE), {})
    about = {"version": _VERSION, "msmil": msmil.__version__, "labels": list(config.data.labels)} | about
    graph = None
    if formats:
        images = _images(folder, shards)
        network = build_network(config, (images.height_px, images.width_px), pretrained=False)
        fill(network, weights, (images.height_px, images.width_px), found)
        graph = InferenceGraph(config, network, images).eval()
        about["graph"] = describe(graph)
    size_bytes = sum(x.numel() * x.element_size() for x in weights.values())
    with atomic_folder(out, needed_bytes=int(size_bytes * (1 + len(formats)) * _FREE_SPACE_FACTOR)) as target:
        save_file({key: value.contiguous() for key, value in weights.items()}, target / WEIGHTS_FILE)
        (target / "config.yaml").write_text(dump_config(_for_others(config, out)), encoding="utf-8")
        if graph is not None:
            files = {name: written_and_verified(graph, name, target, json.dumps(about)) for name in formats}
            about["files"] = {WRITERS[name].file: difference for name, difference in files.items()}
        (target / ABOUT_NAME).write_text(json.dumps(about, indent=2), encoding="utf-8")
    return about


def _refuse_foreign(out: Path) -> None:
    """What is there already is replaced, so it had better be an export."""
    if out.exists() and not (out / ABOUT_NAME).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError("exists and is no export", file=out, fix="name a new folder with --out")


def _weights(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `msmil evaluate` judges, and where it comes from."""
    saved = load_checkpoint(checkpoint)
    state = saved.state
    return evaluated_weights(saved), {
        "checkpoint": checkpoint.name,
        "step": state.step,
        "epoch": state.epoch,
        "validation_auroc": metric_of(state),
        "averaged_weights": saved.ema is not None,
        "data_fingerprint": state.data_fingerprint,
    }


def _for_others(config: Config, out: Path) -> Config:
    """The configuration of a start from these weights: no path of this machine but the folder's own."""
    return replace(
        config,
        name=out.resolve().name,
        output_dir=str(out.parent),
        data=replace(config.data, shards=Config().data.shards, features=""),
        model=replace(config.model, weights="", pretrained=False),
    )


def _images(folder: RunFolder, shards: str | None) -> StoredImages:
    if shards is not None:
        manifest = read_manifest(shards)
        return StoredImages(manifest.height_px, manifest.width_px, manifest.dtype)
    try:
        data = json.loads(folder.data.read_text(encoding="utf-8"))
        return StoredImages(int(data["height_px"]), int(data["width_px"]), str(data["dtype"]))
    except (OSError, ValueError, KeyError, TypeError):
        fix = "name packed data of these images with --shards"
        thing = "does not tell the size and type of its images (data.json)"
        raise UserError(thing, file=folder.root, fix=fix) from None
