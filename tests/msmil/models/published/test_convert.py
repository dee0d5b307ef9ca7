"""Published checkpoints -> our models: every key is used or named, and so is what keys do not tell.

The shapes are those of the published state dicts (tests/parity/data); the numbers are drawn.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import msmil
from msmil.models.backbone import Backbone, build_backbone
from msmil.models.published.convert import convert
from msmil.models.published.infer import infer
from msmil.models.published.reading import read_published
from shards.errors import UserError

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[3] / "parity" / "data"
ENCODER = "inst_encoder.backbone."
FAMILY = (
    "fpn_abmil", "fpn_settrans", "fpn_abmil_concat", "fpn_settrans_concat", "fpn_abmil_meanp", "backbone_pyramid_abmil",
    "msp_abmil", "single_abmil", "single_settrans", "nested_abmil", "nested_settrans",
)  # fmt: skip


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape, _ in json.loads((DATA / f"keys_{name}.json").read_text())["keys"]}


def state(name: str, *, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the published shapes, which take no memory."""
    return {prefix + key: torch.zeros(()).expand(shape) for key, shape in shapes(name).items()}


def head_only(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state(name).items() if not key.startswith((ENCODER, "inst_encoder._"))}


def mammoclip(name: str = "mammoclip_b2") -> dict[str, Tensor]:
    others = {"text_encoder.weight": torch.zeros(2), "logit_scale": torch.zeros(())}
    return state(name, prefix="image_encoder.") | others


@pytest.fixture(autouse=True, scope="module")
def _one_backbone() -> Iterator[None]:
    """The shapes of a backbone take a second to build: once for all tests."""
    built: dict[str, Backbone] = {}

    def cached(name: str, **arguments: Any) -> Backbone:
        key = repr((name, arguments))
        if key not in built:
            built[key] = build_backbone(name, **arguments)
        return copy.deepcopy(built[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msmil.models.build.build_backbone", cached)
        patch.setattr("msmil.models.published.convert.build_backbone", cached)
        yield


class TestInference:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("fpn_abmil", {"mil_encoder": "mlp", "pooling": "gated_attention", "scale_aggregator": "gated_attention"}),
            ("fpn_abmil_concat", {"scale_aggregator": "concatenation", "deep_supervision": True}),
            ("fpn_abmil_meanp", {"pooling": "gated_attention", "deep_supervision": True}),
            (
                "fpn_settrans",
                {
                    "mil_encoder": "isab",
                    "pooling": "pma",
                    "encoder_blocks": 2,
                    "encoder_layer_norm": True,
                    "inducing_points": (38, 32, 20),
                    "scales": (16, 32, 128),
                    "fpn_dim": 256,
                    "encoder_dim": 256,
                    "nested": False,
                },
            ),
            ("backbone_pyramid_abmil", {"scales": (16, 32, 128)}),
            ("msp_abmil", {"instance_encoder": "msp", "scales": (128, 256, 384), "backbone": "mammoclip_b2"}),
            ("single_abmil", {"instance_encoder": "single", "pooling": "gated_attention"}),
            ("single_settrans", {"instance_encoder": "single", "inducing_points": (14,), "pooling": "pma"}),
            ("nested_abmil", {"nested": True, "mil_encoder": "mlp"}),
            ("nested_settrans", {"nested": True, "inducing_points": (31, 25, 13), "region_inducing_points": 6}),
        ],
    )
    def test_what_the_keys_tell(self, name: str, words: dict[str, Any]) -> None:
        for tensors in (state(name), head_only(name)):
            found = infer(read_published(tensors))
            assert {word: found.certain.get(word) for word in words} == words
            assert found.certain["backbone"] == "mammoclip_b2"
            assert found.num_labels == 1

    def test_what_they_do_not_tell(self) -> None:
        found = infer(read_published(state("fpn_abmil_meanp")))
        assert found.open == {"instance_encoder": ("fpn", "backbone_pyramid"), "scale_aggregator": ("mean_p", "max_p")}
        assert found.free == {"upsample": "nearest", "probability": "softmax", "in_channels": 3, "drop_path_rate": 0.2}
        found = infer(read_published(state("nested_settrans")))
        assert found.free["encoder_heads"] == 4
        assert found.free["pma_heads"] == 1
        assert found.open["region_mil_encoder"] == ("same", "isab")

    def test_pooling_without_weights_is_mean_or_max(self) -> None:
        tensors = {key: value for key, value in state("fpn_abmil").items() if ".aggregators." not in key}
        assert infer(read_published(tensors)).open["pooling"] == ("mean", "max")

    def test_a_file_that_sorts_its_keys_has_no_order_of_scales(self) -> None:
        tensors = dict(sorted(state("fpn_abmil").items()))
        assert infer(read_published(tensors)).certain["scales"] == (16, 32, 128)


class TestWholeModels:
    @pytest.mark.parametrize("name", FAMILY)
    def test_every_key_is_loaded(self, name: str) -> None:
        converted = convert(state(name))
        assert {theirs for theirs, _ in converted.report.loaded.values()} == shapes(name).keys()
        assert not converted.report.unused
        assert not converted.report.converted
        assert converted.network is not None
        parameters = json.loads((DATA / f"keys_{name}.json").read_text())["n_parameters"]
        assert sum(p.numel() for p in converted.network.parameters()) == parameters

    def test_the_report_names_all(self) -> None:
        text = convert(state("fpn_abmil")).report.text()
        assert "inferred from keys and shapes: scale_aggregator = 'gated_attention'" in text
        assert "published default taken: instance_encoder = 'fpn'" in text
        assert "loaded pyramid.lateral.16.weight <- inst_encoder.inner_blocks.inner_block_0.0.weight [256, 120" in text

    def test_a_head_beside_a_named_encoder(self) -> None:
        converted = convert(head_only("fpn_abmil"), encoder={"model": mammoclip(), "config": {}})
        head = ("image_encoder._conv_head", "image_encoder._bn1")
        others = {"text_encoder.weight", "logit_scale"}
        assert converted.report.unused.keys() == others | {key for key in mammoclip() if key.startswith(head)}
        loaded = {theirs.replace("image_encoder.", ENCODER) for theirs, _ in converted.report.loaded.values()}
        assert loaded == shapes("fpn_abmil").keys()

    @pytest.mark.parametrize("name", ["msp_abmil", "single_settrans"])
    def test_a_head_without_any_key_of_an_encoder(self, name: str) -> None:
        converted = convert(head_only(name), encoder=mammoclip())
        assert converted.model.backbone == "mammoclip_b2"
        loaded = {theirs.replace("image_encoder.", "inst_encoder.") for theirs, _ in converted.report.loaded.values()}
        assert loaded == shapes(name).keys()

    def test_a_shared_norm_of_the_pyramid(self) -> None:
        """One GroupNorm and no biases; the state dict repeats it under four names."""
        names = [f"inst_encoder.{kind}_blocks.{kind}_block_{i}" for kind in ("inner", "layer") for i in (0, 1)]
        tensors = {key: value for key, value in state("fpn_abmil").items() if key not in {f"{n}.0.bias" for n in names}}
        tensors |= {f"{name}.1.{part}": torch.ones(256) for name in names for part in ("weight", "bias")}
        converted = convert(tensors)
        assert converted.model.pyramid_norm
        assert len(converted.report.unused) == 6
        tensors[f"{names[2]}.1.bias"] = torch.zeros(256)
        with pytest.raises(UserError, match=r"layer_block_0\.1\.bias differs from .*inner_block_0\.1\.bias"):
            convert(tensors)

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("fpn_abmil_meanp", {"scale_aggregator": "max_p", "instance_encoder": "backbone_pyramid"}),
            ("fpn_abmil", {"upsample": "bilinear", "probability": "sparsemax", "region_pooling": "same"}),
            ("single_abmil", {"scales": [128]}),
            ("nested_abmil", {"region_mil_encoder": "mlp", "region_pooling": "gated_attention"}),
        ],
    )
    def test_words_that_fit_the_keys(self, name: str, config: dict[str, Any]) -> None:
        model = dataclasses.asdict(convert(state(name), config=config).model)
        assert {word: model[word] for word in config} == {
            w: tuple(v) if w == "scales" else v for w, v in config.items()
        }

    def test_tiles_of_several_sizes(self) -> None:
        model = msmil.load_published(state("msp_abmil"))
        with torch.inference_mode():
            output = model({size: torch.zeros(1, 1, 1, size // 4, size // 4) for size in (128, 256, 384)})
        assert output.logit_BK.shape == (1, 1)
        assert output.scale_weight_BKS.shape == (1, 1, 3)

    def test_one_input_channel_sums_the_stem(self) -> None:
        torch.manual_seed(0)
        stem = torch.randn(32, 3, 3, 3)
        converted = convert({**state("fpn_abmil"), f"{ENCODER}_conv_stem.weight": stem}, config={"in_channels": 1})
        key = "backbone.net.conv_stem.weight"
        torch.testing.assert_close(converted.state[key], stem[:, 0:1] + stem[:, 1:2] + stem[:, 2:3])
        assert converted.report.converted == {key: "three channels summed into one"}

    def test_config_decides_what_keys_do_not_tell(self) -> None:
        converted = convert(state("fpn_settrans"), config={"encoder_heads": 8, "pma_heads": 2})
        assert {theirs for theirs, _ in converted.report.loaded.values()} == shapes("fpn_settrans").keys()
        assert converted.network is not None
        assert {m.heads for m in converted.network.modules() if hasattr(m, "heads")} == {8, 2}
        assert "encoder_heads" not in converted.report.assumed

    def test_a_loaded_model_is_in_eval_mode_and_in_single_precision_and_can_be_finetuned(self) -> None:
        half = {key: value.half() if value.is_floating_point() else value for key, value in state("fpn_abmil").items()}
        with torch.inference_mode():
            model = msmil.load_published(half)
        assert not any(module.training for module in model.modules())
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestEncoders:
    @pytest.mark.parametrize("name", ["mammoclip_b2", "mammoclip_b5"])
    def test_of_mammoclip(self, name: str) -> None:
        converted = convert({"model": mammoclip(name), "optimizer": {}, "config": {"model": {}}, "epoch": 7})
        assert converted.network is None
        assert converted.model.backbone == name
        assert {key for key in converted.state if not key.startswith("backbone.net.")} == set()
        unused = {key for key in converted.report.unused if key.startswith("image_encoder.")}
        assert unused == {f"image_encoder.{key}" for key in shapes(name) if key.startswith(("_conv_head", "_bn1"))}
        assert len(converted.state) == len(shapes(name)) - 6

    def test_is_no_model(self) -> None:
        with pytest.raises(UserError, match="holds an encoder alone"):
            msmil.load_published(mammoclip())


class TestRefused:
    def refused(self, match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            convert(*arguments, **options)

    def test_another_architecture(self) -> None:
        self.refused(
            r"another architecture.*conv1\.weight", {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
        )

    def test_another_image_encoder(self) -> None:
        tensors = {"image_encoder.model.layer1.weight": torch.zeros(2), "text_encoder.x": torch.zeros(1)}
        self.refused(r"another architecture.*image_encoder\.model\.layer1", tensors)

    def test_another_efficientnet(self) -> None:
        fewer = {key: value for key, value in mammoclip().items() if "_blocks.22." not in key}
        self.refused(r"encoder has 22 blocks \(mammoclip_b2 has 23, mammoclip_b5 has 39\)", fewer)

    def test_another_instance_encoder(self) -> None:
        tensors = {k.replace(".encoder_16.0.0.", ".encoder_16.0.conv."): v for k, v in state("fpn_abmil").items()}
        self.refused(r"another architecture.*encoder_16\.0\.conv", tensors)

    def test_tensors_that_are_missing_left_over_or_of_another_shape(self) -> None:
        tensors = {**state("fpn_abmil"), "new.weight": torch.zeros(3), f"{ENCODER}_blocks.3._bn0.bias": torch.zeros(7)}
        del tensors["classifier.head_classifier.bias"]
        missing = r"missing: classifier\.bias \(1,\)"
        shape = rf"{ENCODER}_blocks\.3\._bn0\.bias \(7,\) where \(144,\) belongs"
        self.refused(rf"{missing}; unexpected: {shape}, new\.weight \(3,\)\)", tensors)

    def test_no_encoder(self) -> None:
        self.refused(r"holds no encoder.*name the file.*\(mammoclip_b2\)", head_only("fpn_abmil"))

    def test_two_encoders(self) -> None:
        self.refused("holds its own encoder, and another one", state("fpn_abmil"), encoder=mammoclip())
        self.refused("holds an encoder itself", mammoclip(), encoder=mammoclip())

    def test_an_encoder_of_another_width(self) -> None:
        self.refused(
            r"is a mammoclip_b5, but .* expects a mammoclip_b2",
            head_only("fpn_abmil"),
            encoder=mammoclip("mammoclip_b5"),
        )

    def test_an_encoder_file_without_an_encoder(self) -> None:
        self.refused("named as the encoder, but holds none", head_only("fpn_abmil"), encoder=head_only("fpn_abmil"))

    @pytest.mark.parametrize("channels", [2, 4])
    def test_a_stem_of_other_channels(self, channels: int) -> None:
        tensors = {**state("fpn_abmil"), f"{ENCODER}_conv_stem.weight": torch.zeros(32, channels, 3, 3)}
        self.refused(rf"stem .* has shape \(32, {channels}, 3, 3\)", tensors)

    def test_more_channels_than_the_stem(self) -> None:
        tensors = {**state("fpn_abmil"), f"{ENCODER}_conv_stem.weight": torch.zeros(32, 1, 3, 3)}
        self.refused(r"config says in_channels: 3, the keys say 1", tensors, config={"in_channels": 3})

    def test_scales_in_another_order(self) -> None:
        names = {"16": "128", "32": "16", "128": "32"}
        tensors = {_renamed(key, names): value for key, value in state("fpn_abmil").items()}
        self.refused("names its scales 128, 16, 32, but .* by position 16, 32, 128", tensors)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"scales": [128, 32, 16]}, r"scales: \[128, 32, 16\], the keys say \[16, 32, 128\]"),
            ({"scales": [16, 32, 64, 128]}, r"the keys say \[16, 32, 128\]"),
            ({"mil_encoder": "isab"}, "mil_encoder: 'isab', the keys say 'mlp'"),
            ({"instance_encoder": "msp"}, "instance_encoder: 'msp', the keys say 'fpn' or 'backbone_pyramid'"),
            ({"scale_aggregator": "concatenation"}, "the keys say 'gated_attention'"),
            ({"deep_supervision": False}, "deep_supervision: False, the keys say True"),
            ({"backbone": "efficientnet_b2"}, "the keys say 'mammoclip_b2'"),
            ({"pretrained": True}, "leave it out: the weights are those of the file"),
            ({"encoder_hats": 4}, r"unknown key model\.encoder_hats"),
            ({"in_channels": 2}, r"model\.in_channels is 2"),
        ],
    )
    def test_a_config_that_contradicts_the_keys(self, config: dict[str, Any], message: str) -> None:
        self.refused(message, state("fpn_abmil"), config=config)

    def test_heads_that_do_not_divide_the_width(self) -> None:
        self.refused(r"encoder_heads is 7, which does not divide", state("fpn_settrans"), config={"encoder_heads": 7})


def _renamed(key: str, names: dict[str, str]) -> str:
    for part in ("encoder_", "aggregator_", "classifier_"):
        for old, new in names.items():
            if f".{part}{old}." in key:
                return key.replace(f".{part}{old}.", f".{part}{new}.")
    return key
