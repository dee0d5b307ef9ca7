"""The published encoders as backbones: the padding is static, everything else is timm's."""

from __future__ import annotations

import pytest
import torch

from msmil.models.backbone import Backbone, build_backbone, ordered_blocks
from msmil.models.centres import cell_centres
from msmil.models.mammoclip import StaticPadConv2d
from shards.errors import UserError
from tests.msmil.models.small import small_model


def build(name: str, *, scales: tuple[int, ...] = (16, 32), **changes: object) -> Backbone:
    with torch.device("meta"):
        return build_backbone(name, scales=scales, in_channels=3, tile_hw=(256, 256), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "channels", "parameters", "blocks"),
    [("mammoclip_b2", (120, 352), 7_202_562, 23), ("mammoclip_b5", (176, 512), 27_288_112, 39)],
)
def test_size(name: str, channels: tuple[int, ...], parameters: int, blocks: int) -> None:
    backbone = build(name)
    assert (backbone.strides, backbone.channels) == ((16, 32), channels)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert len(ordered_blocks(backbone)) == blocks


def test_batch_norm_is_the_published_one() -> None:
    norms = [m for m in build("mammoclip_b2").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_parameters_keep_timms_names() -> None:
    assert build("mammoclip_b2").state_dict().keys() == build("efficientnet_b2").state_dict().keys()


def test_a_padded_convolution_is_the_convolution_of_the_padded_image() -> None:
    plain = torch.nn.Conv2d(2, 4, 3, stride=2, bias=False)
    image = torch.randn(1, 2, 6, 6)
    around = torch.zeros(1, 2, 7, 7)
    around[:, :, :6, :6] = image  # one column of zeros on the right, one row at the bottom
    torch.testing.assert_close(StaticPadConv2d(plain, (0, 1, 0, 1))(image), plain(around))


def test_its_cells_lie_where_the_padding_puts_them() -> None:
    """Stem and stage 2 look one pixel further (2 i + 1), stage 3 does not: stride 8 is centred on 8 i + 3.5."""
    model = small_model(backbone="mammoclip_b2", backbone_options={}, scales=(8,), inducing_points=(3,))
    assert cell_centres(model, (64, 64))[8] == pytest.approx((-0.5, -0.5), abs=1)


def test_the_hub_has_no_weights_of_it() -> None:
    with pytest.raises(UserError, match=r"no weights of 'mammoclip_b5'.*msmil convert.*model.weights"):
        build("mammoclip_b5", pretrained=True)


def test_near_names_are_offered() -> None:
    with pytest.raises(UserError, match=r"did you mean.*mammoclip_b2"):
        build("mammoclip_b3")
