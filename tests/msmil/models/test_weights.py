"""Weights to start from: all of them, into the model they belong to, or a clear refusal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from msmil.config import Config, ModelConfig
from msmil.config_io import dump_config
from msmil.models.backbone import build_backbone
from msmil.models.weights import check_weights, load_weights
from shards.errors import UserError
from tests.msmil.models.small import small_config, small_model


def written(folder: Path, network: nn.Module, config: ModelConfig | None = None, *, only: str = "") -> str:
    """A folder as `msmil convert` writes it."""
    folder.mkdir(exist_ok=True)
    state = {key: value.clone() for key, value in network.state_dict().items() if key.startswith(only)}
    save_file(state, folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(Config(model=config or small_config())))
    return str(folder)


def starting(folder: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(small_config(**changes), weights=folder)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_whole_model(tmp_path: Path, name: str) -> None:
    theirs, ours = small_model(seed=1), small_model(seed=2)
    folder = written(tmp_path / "w", theirs)
    weights = load_weights(starting(str(Path(folder) / name)), ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True))
    assert not weights.encoder_alone
    assert "the whole model" in weights.text()


def test_an_encoder_alone_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    theirs, ours = small_model(seed=1), small_model(seed=2)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    weights = load_weights(starting(written(tmp_path / "w", theirs, only="backbone.")), ours)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key] if key.startswith("backbone.") else before[key])
    assert weights.encoder_alone
    assert "pyramid and MIL layers start at random" in weights.text()


def test_stages_of_an_encoder_behind_the_last_wanted_map_are_named(tmp_path: Path) -> None:
    config = ModelConfig(backbone="test_efficientnet", scales=(8, 16))
    whole, shorter = nn.Module(), nn.Module()
    for model, scales in ((whole, (16, 32)), (shorter, (8, 16))):
        model.backbone = build_backbone("test_efficientnet", scales=scales, in_channels=1, tile_hw=(64, 64))
    folder = written(tmp_path / "w", whole, config)
    weights = load_weights(dataclasses.replace(config, weights=folder), shorter)
    stages = {key.split(".")[3] for key in weights.behind}
    assert stages == {"4"}
    assert f"{len(weights.behind)} tensors behind the last map are not used" in weights.text()


class TestRefused:
    def refused(self, match: str, config: ModelConfig, network: nn.Module) -> None:
        with pytest.raises(UserError, match=match):
            check_weights(config, network)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused("model.weights cannot be read.*msmil convert", starting(str(tmp_path / "no")), small_model())

    def test_a_published_file(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(1)}, tmp_path / "best_model.pth")
        self.refused("a published file is converted first", starting(str(tmp_path / "best_model.pth")), small_model())

    def test_another_number_of_labels(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "w", small_model(labels=1))
        self.refused(r"head\.bias \[1\] where the model has \[2\].*data\.labels", starting(folder), small_model())

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        theirs = small_model()
        del theirs.classifier.bias
        self.refused(r"classifier\.bias nothing where", starting(written(tmp_path / "w", theirs)), small_model())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"encoder_heads": 4}, "model.encoder_heads is 2 there and 4 here.*set model.encoder_heads=2"),
            ({"backbone_options": {"act_layer": "silu"}}, "backbone_options is .* there"),
        ],
    )
    def test_words_that_shapes_do_not_tell(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        self.refused(message, starting(written(tmp_path / "w", small_model()), **changes), small_model())

    def test_the_same_shapes_padded_otherwise(self, tmp_path: Path) -> None:
        config = ModelConfig(backbone="mammoclip_b2")
        with torch.device("meta"):
            network = nn.Module()
            network.backbone = build_backbone("efficientnet_b2", scales=(16, 32), in_channels=1, tile_hw=(64, 64))
        small = nn.Module()
        small.backbone = nn.Linear(2, 2)
        folder = written(tmp_path / "w", small, config)
        self.refused(
            "model.backbone is 'mammoclip_b2' there and 'efficientnet_b2' here", ModelConfig(weights=folder), network
        )

    def test_options_that_a_published_encoder_has_anyway_may_be_said(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            network = nn.Module()
            network.backbone = build_backbone("mammoclip_b2", scales=(16, 32), in_channels=1, tile_hw=(64, 64))
        small = nn.Module()
        small.backbone = nn.Linear(2, 2)
        folder = written(tmp_path / "w", small, ModelConfig(backbone="mammoclip_b2"))
        said = ModelConfig(backbone="mammoclip_b2", weights=folder, backbone_options={"bn_eps": 1e-3})
        self.refused("does not fit the model: backbone", said, network)  # the words are the same, the tensors are not

    def test_two_ways_to_start(self, tmp_path: Path) -> None:
        config = dataclasses.replace(starting(written(tmp_path / "w", small_model())), pretrained=True)
        self.refused("model.pretrained and model.weights are both set", config, small_model())

    def test_no_config_beside_it(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "w", small_model())
        (tmp_path / "w" / "config.yaml").unlink()
        self.refused("no config.yaml beside it", starting(folder), small_model())
