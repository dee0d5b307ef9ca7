from __future__ import annotations

from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from msmil.models.backbone import (
    Backbone,
    build_backbone,
    freeze_statistics,
    ordered_blocks,
    set_gradient_checkpointing,
    set_trainable,
)
from shards.errors import UserError
from tests.msmil.models.small import SMALL_BACKBONE, small_model, with_backbone

pytestmark = pytest.mark.slow

DEMO_OPTIONS = {"channels": [24, 32, 64, 96], "stem_width": 8}


def build(name: str = "test_efficientnet", *, px: int = 64, **changes: Any) -> Backbone:
    settings: dict[str, Any] = {"scales": (16, 32), "in_channels": 1, "tile_hw": (px, px), **changes}
    return build_backbone(name, **settings)


def outline(name: str, **changes: Any) -> Backbone:
    """Its structure and shapes, without numbers."""
    with torch.device("meta"):
        return build(name, **changes)


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "options", "scales", "strides", "channels"),
    [
        ("resnet10t", DEMO_OPTIONS, (8, 16, 32), (8, 16, 32), (32, 64, 96)),
        ("resnet10t", DEMO_OPTIONS, (4, 64), (4,), (24,)),
        ("test_convnext", {}, (4, 32), (4, 32), (24, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": [64, 64]}, (8, 16), (8, 16), (192, 384)),
        ("test_vit", {"img_size": [64, 64]}, (16, 32), (16,), (64,)),
    ],
)
def test_maps_have_the_promised_strides_and_channels(
    name: str,
    options: dict[str, Any],
    scales: tuple[int, ...],
    strides: tuple[int, ...],
    channels: tuple[int, ...],
) -> None:
    backbone = outline(name, scales=scales, options=options)
    assert (backbone.strides, backbone.channels) == (strides, channels)
    maps = backbone(torch.empty(2, 1, 64, 64, device="meta"))
    assert [tuple(m.shape) for m in maps] == [(2, d, 64 // s, 64 // s) for d, s in zip(channels, strides, strict=True)]


@pytest.mark.parametrize("in_channels", [1, 3])
def test_input_channels(in_channels: int) -> None:
    assert build(in_channels=in_channels)(torch.randn(1, in_channels, 64, 64))[0].shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("name", "options"), [("test_efficientnet", {}), ("resnet10t", DEMO_OPTIONS), ("test_vit", {"img_size": [64, 64]})]
)
@pytest.mark.parametrize("scales", [(16,), (16, 32)])
def test_gradients_reach_every_trainable_parameter(name: str, options: dict[str, Any], scales: tuple[int, ...]) -> None:
    backbone = build(name, scales=scales, options=options)
    torch.stack([m.square().sum() for m in backbone(torch.randn(2, 1, 64, 64))]).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_stages_behind_the_last_wanted_map_are_not_built() -> None:
    assert len(outline("efficientnet_b2", scales=(8, 16)).net.get_submodule("blocks")) == 5
    assert len(outline("efficientnet_b2", scales=(16, 32)).net.get_submodule("blocks")) == 7


def test_parameters_the_wanted_maps_do_not_depend_on_never_train() -> None:
    backbone = outline("hrnet_w18_small", scales=(32,))
    every = {name for name, _ in backbone.net.named_parameters()}
    used = {name for name, _ in backbone.used_parameters()}
    assert used < every
    assert {name for name, p in backbone.net.named_parameters() if p.requires_grad} == used
    model = with_backbone(backbone)
    set_trainable(model, 0)
    set_trainable(model, "all")
    assert {name for name, p in backbone.net.named_parameters() if p.requires_grad} == used


def test_an_architecture_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that builds it again (folds, seeds) does not trace it again; another size of image it does."""
    monkeypatch.setattr("msmil.models.backbone._CHECKED", {})
    first = outline("test_efficientnet", scales=(8, 16))

    def traced(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(Backbone, "_check_contract", traced)
    again = build("test_efficientnet", scales=(8, 16))
    assert [name for name, _ in again.used_parameters()] == [name for name, _ in first.used_parameters()]
    for other in ({"px": 96}, {"in_channels": 3}, {"scales": (8, 32)}, {"options": {"act_layer": "relu"}}):
        with pytest.raises(AssertionError, match="traced again"):
            build("test_efficientnet", **{"scales": (8, 16), **other})


class TestErrors:
    def test_unknown_backbone_names_near_ones(self) -> None:
        with pytest.raises(UserError, match=r"efficientnet_b22.*did you mean.*efficientnet_b2'"):
            build("efficientnet_b22")

    def test_missing_stride_names_backbone_and_its_strides(self) -> None:
        with pytest.raises(UserError, match=r"strides \[2\], but backbone 'test_convnext' .*\[4, 8, 16, 32\]"):
            build("test_convnext", scales=(2, 16))

    def test_scales_that_are_all_coarser_than_the_backbone(self) -> None:
        with pytest.raises(UserError, match=r"strides \[64, 128\], but backbone"):
            build(scales=(64, 128))

    def test_unknown_option(self) -> None:
        with pytest.raises(UserError, match=r"unexpected keyword argument 'chanels'.*backbone_options"):
            build("resnet10t", options={"chanels": [8, 8, 8, 8]})

    def test_drop_path_where_there_is_none(self) -> None:
        assert outline("dla46_c", drop_path_rate=0.0).strides == (16, 32)
        with pytest.raises(UserError, match=r"drop_path_rate is 0\.1, but backbone 'dla46_c' has no stochastic depth"):
            outline("dla46_c", drop_path_rate=0.1)

    def test_weights_that_cannot_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")
        with pytest.raises(UserError, match=r"weights of 'resnet10t' could not be loaded.*model.pretrained: false"):
            build("resnet10t", pretrained=True)

    def test_weights_that_do_not_exist(self) -> None:
        with pytest.raises(UserError, match=r"weights of 'dpn48b' could not be loaded.*No pretrained weights exist"):
            build("dpn48b", pretrained=True)

    def test_an_image_size_the_backbone_does_not_take(self) -> None:
        with pytest.raises(
            UserError, match=r"'vit_tiny_patch16_224' cannot take 1 x 64 x 64 pixels.*img_size: \[64, 64\]"
        ):
            outline("vit_tiny_patch16_224")

    def test_maps_of_other_sizes_than_the_strides_promise(self) -> None:
        with pytest.raises(UserError, match=r"inception_v4.*returns maps .*promise \[\(1024, 16, 16\)"):
            outline("inception_v4", px=256)

    def test_an_option_of_the_wrong_form(self) -> None:
        with pytest.raises(UserError, match=r"cannot build 'resnet10t' as a feature extractor.*backbone_options"):
            build("resnet10t", options={"channels": [8, 8]})


class TestTrainable:
    def test_efficientnet_b2_has_23_blocks(self) -> None:
        backbone = outline("efficientnet_b2")
        stages = backbone.net.get_submodule("blocks")
        assert ordered_blocks(backbone) == [block for stage in stages for block in stage]
        assert len(ordered_blocks(backbone)) == 23

    def test_last_eight_of_efficientnet_b2(self) -> None:
        """As published: blocks 15..22 train, which are the last of stage 5 and stages 6 and 7."""
        backbone = outline("efficientnet_b2")
        set_trainable(with_backbone(backbone), 8)
        trained = {name.rsplit(".", 2)[0] for name, p in backbone.net.named_parameters() if p.requires_grad}
        blocks = {".".join(name.split(".")[:3]) for name in trained}
        assert blocks == {"blocks.4.3", *(f"blocks.5.{i}" for i in range(5)), "blocks.6.0", "blocks.6.1"}
        assert not any(p.requires_grad for b in ordered_blocks(backbone)[:15] for p in b.parameters())

    @pytest.mark.parametrize(
        ("name", "options", "count"),
        [
            ("resnet10t", DEMO_OPTIONS, 4),
            ("test_convnext", {}, 9),
            ("test_vit", {"img_size": [64, 64]}, 6),
            ("swin_tiny_patch4_window7_224", {"img_size": [64, 64]}, 12),
        ],
    )
    def test_blocks_of_other_families(self, name: str, options: dict[str, Any], count: int) -> None:
        assert len(ordered_blocks(outline(name, options=options))) == count

    def test_all_trains_the_stem_and_none_trains_nothing(self) -> None:
        model = small_model()
        set_trainable(model, 0)
        assert not any(p.requires_grad for p in model.backbone.parameters())
        assert all(p.requires_grad for p in model.pyramid.parameters())
        set_trainable(model, "all")
        assert all(p.requires_grad for p in model.backbone.parameters())

    def test_more_blocks_than_there_are(self) -> None:
        with pytest.raises(UserError, match=r"trainable_blocks is 5, but backbone 'resnet10t' has 4 blocks"):
            set_trainable(small_model(), 5)


class TestModes:
    def test_what_is_frozen_stays_in_eval_mode(self) -> None:
        model = small_model()
        set_trainable(model, 2)
        model.train()
        first, second, third, fourth = ordered_blocks(model.backbone)
        assert [any(m.training for m in b.modules()) for b in (first, second)] == [False, False]
        assert all(m.training for b in (third, fourth) for m in b.modules())
        assert model.branches.training
        set_trainable(model, "all")
        assert all(m.training for m in model.modules())

    def test_a_frozen_backbone_computes_in_eval_mode_and_without_a_graph(self) -> None:
        backbone = build(options={"drop_rate": 0.5}, drop_path_rate=0.5)
        model = with_backbone(backbone)
        set_trainable(model, 0)
        model.train()
        image = torch.randn(4, 1, 64, 64)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        first, second = backbone(image), backbone(image)
        assert not any(m.requires_grad for m in first)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    def test_frozen_statistics_do_not_move_while_weights_train(self) -> None:
        model = small_model()
        freeze_statistics(model)
        model.eval()
        model.train()
        before = [m.running_mean.clone() for m in norms(model.backbone)]
        features = model.backbone(torch.randn(4, 1, 64, 64) + 3)
        assert all(torch.equal(m.running_mean, b) for m, b in zip(norms(model.backbone), before, strict=True))
        assert all(m.requires_grad for m in features)
        assert ordered_blocks(model.backbone)[0].training

    def test_statistics_move_where_nobody_froze_them(self) -> None:
        model = small_model().train()
        before = [m.running_mean.clone() for m in norms(model)]
        model.backbone(torch.randn(4, 1, 64, 64) + 3)
        assert not any(torch.equal(m.running_mean, b) for m, b in zip(norms(model), before, strict=True))


class TestGradientCheckpointing:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("test_efficientnet", {}),
            ("resnet10t", SMALL_BACKBONE["backbone_options"]),
            ("test_vit", {"img_size": [64, 64]}),
        ],
    )
    def test_gradients_are_the_same(self, name: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        backbone = build(name, options=options)
        model = with_backbone(backbone)
        freeze_statistics(model)
        image = torch.randn(2, 1, 64, 64)
        gradients = []
        for enable in (False, True):
            set_gradient_checkpointing(model, enable)
            backbone.zero_grad()
            torch.stack([m.square().sum() for m in backbone(image)]).sum().backward()
            gradients.append([p.grad.clone() for p in backbone.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)

    def test_it_recomputes(self) -> None:
        backbone = build()
        model = with_backbone(backbone)
        freeze_statistics(model)
        set_gradient_checkpointing(model)
        calls: list[int] = []
        ordered_blocks(backbone)[0].register_forward_pre_hook(lambda *_: calls.append(1))
        torch.stack([m.sum() for m in backbone(torch.randn(1, 1, 64, 64))]).sum().backward()
        assert len(calls) == 2

    def test_backbones_without_it_say_so(self) -> None:
        with pytest.raises(UserError, match=r"timm does not offer it for 'hrnet_w18_small'"):
            set_gradient_checkpointing(with_backbone(outline("hrnet_w18_small")))
