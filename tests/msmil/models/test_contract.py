"""The contract that every backbone is used by: a map per wanted stride, with the channels it promises.

Shapes only, on the meta device, for grey images.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from msmil.models.backbone import build_backbone

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
    with torch.device("meta"):
        backbone = build_backbone(name, scales=(*scales, 128), in_channels=1, tile_hw=(PX, PX), options=options)
        maps = backbone(torch.empty(2, 1, PX, PX))
    assert (backbone.strides, backbone.channels) == (scales, channels)
    assert [tuple(m.shape) for m in maps] == [(2, d, PX // s, PX // s) for d, s in zip(channels, scales, strict=True)]


def test_a_pretrained_stem_is_summed_for_grey_images() -> None:
    """timm does it when it loads weights; here on its own loading function."""
    stem = torch.randn(32, 3, 3, 3, dtype=torch.float64)
    grey = timm.models._manipulate.adapt_input_conv(1, stem)
    image = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    three = torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), stem)
    torch.testing.assert_close(torch.nn.functional.conv2d(image, grey.double()), three, rtol=1e-5, atol=1e-5)
