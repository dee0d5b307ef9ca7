"""`msmil bench`: numbers beside their baseline, from one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from tests.experiments import write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu")]

Capture = pytest.CaptureFixture[str]


def test_a_step_is_measured_beside_the_published_way(
    tmp_path: Path, packed: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)  # what a compiler makes of it, tests/gpu looks at
    config = write_tiny(tmp_path, packed, train={"batch_size": 2, "accumulation": 2, "trainable_blocks": 1})
    words = ["bench", "train", str(config), "--steps", "1", "--modes", "each", "--find-batch"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == {"wait", "forward", "backward", "communication", "optimizer", "step"}
    assert found["images_per_s"] > 0
    assert found["flop_per_image"] > 1e6
    assert 0 < found["share_of_matmul"] < 1
    assert found["peak_bytes"] > 1e7
    published, ours, tiled, kept = found["compared"]
    assert published["ratio"] == 1
    assert published["name"].startswith("published way: fp32")
    assert ours["ratio"] == pytest.approx(published["work_s"] / ours["work_s"])
    assert kept["name"].startswith("published way, freed memory kept")
    assert tiled["name"].endswith("tiles of 512")
    assert found["pixels_per_image"] == {"published": 512 * 512, "ours": 64 * 64}
    assert [mode["name"] for mode in found["modes"]][-1] == "bf16 channels_last compiled"
    assert found["largest_batch"]["images"] >= 1
    assert not found["largest_batch"]["tried"]


def test_drawn_images_need_no_data(tmp_path: Path, capsys: Capture) -> None:
    config = write_tiny(tmp_path, tmp_path / "missing", train={"batch_size": 2})
    assert main(["bench", "train", str(config), "--steps", "1", "--synthetic", "96x64"]) == 0
    said = capsys.readouterr().out
    assert "tiny: images of 96 x 64 pixels (drawn), batch 2, all of the backbone's blocks train, fp32" in said
    assert "published / it" in said
    assert "GFLOP per image" in said


def test_the_loader_is_measured_beside_bare_decoding(packed: Path, capsys: Capture) -> None:
    assert main(["bench", "loader", str(packed), "--images", "16", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["codecs"]) == {"png", "zstd"}
    for values in found["codecs"].values():
        assert min(values.values()) > 0
        assert values["in_process_of_limit"] == pytest.approx(values["in_process_per_s"] / values["bare_per_s"])
    assert main(["bench", "loader", str(packed), "--images", "16", "--rounds", "1"]) == 0
    assert "bare decode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "{config}", "--device", "cuda"], "there is no GPU in use"),
        (["train", "{config}", "data.features=somewhere", "train.encoder=frozen"], "data.features is set"),
        (["loader", "{folder}"], "no packed folder"),
        (["loader", "{folder}", "seed=1"], "beside a packed folder"),
        (["train", "{config}", "--synthetic", "96"], "HEIGHTxWIDTH"),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: list[str], said: str, tmp_path: Path, packed: Path, capsys: Capture
) -> None:
    config = write_tiny(tmp_path, packed, bags={"augment": {"horizontal_flip": 0, "vertical_flip": 0}})
    try:
        code = main(["bench", *(word.format(config=config, folder=tmp_path) for word in words)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err
