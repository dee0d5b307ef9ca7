"""The contract that every backbone is used by: a map per wanted stride, with the channels it promises.

Shapes only, on the meta device, for grey images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msmil.models.backbone import build_backbone

pytestmark = pytest.mark.slow

PX = 224
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ("efficientnet_b0", {}, (8, 16, 32), (40, 112, 320)),
    ("efficientnet_b2", {}, (16, 32), (120, 352)),
    ("efficientnet_b5", {}, (16, 32), (176, 512)),
    ("mammoclip_b2", {}, (4, 8, 16, 32), (24, 48, 120, 352)),
    ("tf_efficientnetv2_s", {}, (8, 16, 32), (64, 160, 256)),
    ("convnext_tiny", {}, (4, 8, 16, 32), (96, 192, 384, 768)),
    ("resnet50", {}, (4, 8, 16, 32), (256, 512, 1024, 2048)),
    ("vit_small_patch16_224", {"img_size": [PX, PX]}, (16,), (384,)),
]


@pytest.mark.parametrize(("name", "options", "scales", "channels"), CASES, ids=[case[0] for case in CASES])
def test_strides_and_channels(
    name: str, options: dict[str, Any], scales: tuple[int, ...], channels: tuple[int, ...]
) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(name, scales=(*scales, 128), in_channels=1, tile_hw=(PX, PX), options=options).eval()
        maps = backbone(torch.empty(2, 1, PX, PX))
    assert (backbone.strides, backbone.channels) == (scales, channels)
    assert [tuple(m.shape) for m in maps] == [(2, d, PX // s, PX // s) for d, s in zip(channels, scales, strict=True)]


def test_a_pretrained_stem_is_summed_for_grey_images(tmp_path: Path) -> None:
    """Through timm's own loading. It adds the channels in fp32: exact for these weights, which have few digits."""
    name, settings = "test_efficientnet", {"scales": (16, 32), "tile_hw": (64, 64)}
    colour = build_backbone(name, in_channels=3, **settings)
    stem = colour.net.get_submodule("conv_stem").weight
    with torch.no_grad():
        stem.copy_((stem * 256).round() / 256)
    file = tmp_path / "weights.pth"
    torch.save({key.removeprefix("net."): value for key, value in colour.state_dict().items()}, file)
    options = {"pretrained_cfg_overlay": {"file": str(file)}}
    grey = build_backbone(name, in_channels=1, pretrained=True, options=options, **settings)
    assert grey.net.get_submodule("conv_stem").weight.shape[1] == 1
    image_MCHW = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = colour.double().eval()(image_MCHW.expand(-1, 3, -1, -1))
        for map_MDhw, three in zip(grey.double().eval()(image_MCHW), expected, strict=True):
            torch.testing.assert_close(map_MDhw, three, rtol=1e-10, atol=1e-10 * float(three.std()))
