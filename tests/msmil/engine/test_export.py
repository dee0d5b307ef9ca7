"""What is exported gives what the run gives: weights to start from and to judge, graphs of inference for others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from msmil.config_io import load_config
from msmil.engine import export_graph
from msmil.engine.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from msmil.engine.checkpoint_state import pointed
from msmil.engine.data_summary import describe_data
from msmil.engine.export import export
from msmil.engine.export_graph import InferenceGraph, StoredImages, example_images
from msmil.engine.pipeline import build_network
from msmil.engine.run_folder import RunFolder
from msmil.types import TrainState
from shards.errors import UserError
from shards.manifest import read_manifest
from tests.experiments import write_tiny

TILES = {"instances": "tiles", "tile_size_px": 32}
FEW = {"scales": [4, 8]}  # two of the backbone's four stages: exporters take seconds for what is in a graph
VARIANTS: dict[str, dict[str, Any]] = {
    "fpn_abmil": {"bags": {"local_contrast": 1.0, "local_contrast_sigma_px": 0.3}, "model": FEW},
    "fpn_settrans": {
        "bags": {"padding": "legacy"},
        "model": FEW | {"mil_encoder": "isab", "encoder_blocks": 1, "pooling": "pma", "in_channels": 3},
    },
    "nested": {"bags": TILES, "model": FEW | {"nested": True, "probability": "sparsemax"}},
    "msp": {
        "bags": TILES | {"tile_overlap": 0.5},
        "model": {"instance_encoder": "msp", "scales": [16, 32], "scale_aggregator": "mean_p"},
    },
}


def a_run(folder: Path, packed: Path, *, ema: bool = False, **sections: Any) -> RunFolder:
    """A run with two checkpoints of random weights, the first of them the best."""
    file = write_tiny(folder, packed, **sections)
    config, manifest = load_config(file), read_manifest(packed)
    run = RunFolder(Path(config.output_dir) / config.name)
    for step in (1, 2):
        torch.manual_seed(step)
        weights = build_network(config, (manifest.height_px, manifest.width_px), pretrained=False).state_dict()
        averaged = {f"module.{key}": value * 0.5 for key, value in weights.items()} | {"n_averaged": torch.tensor(3)}
        state = TrainState(step, 1, 0, 6, 0.75, 1, manifest.fingerprint, metric=0.8 - 0.05 * step)
        snapshot = Snapshot(
            model=weights,
            optimizer={"x/step": torch.tensor(1.0)},
            ema=averaged if ema else None,
            state=state,
            loss_scale=None,
            config_yaml=file.read_text(),
        )
        save_checkpoint(run.checkpoints, snapshot)
    run.config.write_text(file.read_text())
    run.describe(describe_data(manifest, config.data.labels))
    return run


def exported(run: RunFolder, out: Path, **more: Any) -> dict[str, Any]:
    return export(run, out, **({"checkpoint": "best", "formats": (), "shards": None} | more))


def stored(packed: Path) -> StoredImages:
    manifest = read_manifest(packed)
    return StoredImages(manifest.height_px, manifest.width_px, manifest.dtype)


def eager(out: Path, images: StoredImages) -> InferenceGraph:
    """The model that msmil makes of an export."""
    config = load_config(out / "config.yaml")
    network = build_network(config, (images.height_px, images.width_px), pretrained=False)
    network.load_state_dict(load_file(out / "model.safetensors"))
    return InferenceGraph(config, network, images).eval()


def run_torch(out: Path, image: Tensor) -> dict[str, Tensor]:
    return torch.export.load(out / "model.pt2").module()(image)


def run_onnx(out: Path, image: Tensor) -> dict[str, Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    given = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return dict(zip(names, map(torch.from_numpy, given), strict=True))


RUNNERS: dict[str, Callable[[Path, Tensor], dict[str, Tensor]]] = {"model.pt2": run_torch, "model.onnx": run_onnx}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "files"),
    [  # ONNX takes most of the time; all four variants have been written as it
        ("fpn_abmil", "uint8", ["model.pt2"]),
        ("fpn_settrans", "uint16", ["model.pt2", "model.onnx"]),
        ("nested", "uint8", ["model.pt2"]),
        ("msp", "uint16", ["model.onnx"]),
    ],
)
def test_a_graph_takes_stored_images_in_any_number_and_gives_what_the_model_gives(
    tmp_path: Path, packed: Path, name: str, dtype: str, files: list[str]
) -> None:
    run_folder, out = a_run(tmp_path, packed, **VARIANTS[name]), tmp_path / "out"
    images = replace(stored(packed), dtype=dtype)
    run_folder.data.write_text(json.dumps(asdict(images)))
    if "model.onnx" in files:
        pytest.importorskip("onnxruntime")
    formats = [name for name, writer in export_graph.WRITERS.items() if writer.file in files]
    about = exported(run_folder, out, formats=formats)
    assert list(about["files"]) == files
    assert max(about["files"].values()) < 1e-5
    model = eager(out, images)
    for batch in (1, 4):
        image = example_images(images, batch)
        with torch.no_grad():
            expected = model(image)
        assert expected["probability_BK"].shape == (batch, 2)
        for file in files:
            given = RUNNERS[file](out, image)
            assert list(given) == list(expected) == list(about["graph"]["outputs"])
            for key, value in expected.items():
                torch.testing.assert_close(given[key], value, rtol=1e-4, atol=1e-5)
                assert about["graph"]["outputs"][key]["shape"] == ["B", *value.shape[1:]]


def test_a_graph_that_gives_other_numbers_is_not_kept(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Callable[[Tensor], dict[str, Tensor]]:
        return lambda image: {key: value * 1.01 for key, value in eager_graph[0](image).items()}

    eager_graph: list[InferenceGraph] = []
    monkeypatch.setattr(export_graph, "_traced", eager_graph.append)
    writer = replace(export_graph.WRITERS["torch-export"], write=wrong)
    monkeypatch.setitem(export_graph.WRITERS, "torch-export", writer)
    with pytest.raises(UserError, match="gives other numbers than the model"):
        exported(a_run(tmp_path, packed), tmp_path / "out", formats=("torch-export",))
    assert not (tmp_path / "out").exists()


def test_what_a_format_needs_is_named(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx\. Fix: pip install 'msmil\[export\]'"):
        exported(a_run(tmp_path, packed), tmp_path / "out", formats=("onnx",))


@pytest.mark.parametrize("ema", [False, True])
def test_the_best_weights_are_written_the_averaged_ones_where_there_are_any(
    tmp_path: Path, packed: Path, ema: bool
) -> None:
    run, out = a_run(tmp_path, packed, ema=ema), tmp_path / "out"
    about = exported(run, out)
    best = pointed(run.checkpoints, "best")
    assert best is not None
    for key, value in load_checkpoint(best).model.items():
        factor = 0.5 if ema else 1
        assert torch.equal(load_file(out / "model.safetensors")[key], value * factor)
    assert about == json.loads((out / "export.json").read_text())
    assert (about["checkpoint"], about["step"], about["averaged_weights"]) == (best.name, 1, ema)
    assert about["validation_auroc"] == pytest.approx(0.75)
    assert str(packed) not in (out / "config.yaml").read_text(), "no path of this machine"
    again = exported(run, out, checkpoint="latest")
    assert again["step"] == 2


def test_what_is_no_export_is_not_replaced(tmp_path: Path, packed: Path) -> None:
    run = a_run(tmp_path, packed)
    with pytest.raises(UserError, match="exists and is no export"):
        exported(run, run.root)
    with pytest.raises(UserError, match="no checkpoint 'step_9'"):
        exported(run, tmp_path / "out", checkpoint="step_9")


def test_where_the_images_are_not_known_they_are_asked_for(tmp_path: Path, packed: Path) -> None:
    run = a_run(tmp_path, packed)
    run.data.unlink()
    exported(run, tmp_path / "out")
    with pytest.raises(UserError, match="--shards"):
        exported(run, tmp_path / "out", formats=("torch-export",))


@pytest.mark.slow
def test_an_export_is_exported_on(tmp_path: Path, packed: Path) -> None:
    """Weights alone, as `msmil convert` writes them too."""
    first, second = tmp_path / "first", tmp_path / "second"
    exported(a_run(tmp_path, packed), first)
    shutil.rmtree(tmp_path / "runs")
    about = exported(RunFolder(first), second, formats=("torch-export",), shards=str(packed))
    assert set(about["files"]) == {"model.pt2"}
    weights = load_file(first / "model.safetensors")
    assert all(torch.equal(weights[key], x) for key, x in load_file(second / "model.safetensors").items())
