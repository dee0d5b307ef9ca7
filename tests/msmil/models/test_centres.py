"""Where a cell looks: measured on the network, whatever its padding, pooling and squeeze-excitation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msmil.models.backbone import set_trainable
from msmil.models.centres import cell_centres
from msmil.models.mil import MILModel
from tests.msmil.models.small import small_model


class Pooling(nn.Module):
    """A backbone without learning: every cell is the mean of its own pixels."""

    def forward(self, image_MCHW: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for _ in range(5):
            image_MCHW = nn.functional.avg_pool2d(image_MCHW, 2)
            maps.append(image_MCHW.repeat(1, 16, 1, 1))
        return maps[3:]


class Sliced(nn.Module):
    """A backbone whose cell sees one pixel alone: `at` (y, x) within the cell."""

    def __init__(self, at: tuple[int, int], fixed_px: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.fixed_px = fixed_px

    def forward(self, image_MCHW: torch.Tensor) -> list[torch.Tensor]:
        assert self.fixed_px in (None, image_MCHW.shape[-1])
        return [image_MCHW[:, :, self.at[0] :: 32, self.at[1] :: 32].repeat(1, 16, 1, 1)]


def with_toy(toy: nn.Module, **changes: object) -> MILModel:
    model = small_model(**changes)
    model.backbone = toy  # type: ignore[assignment]
    for lateral in model.pyramid.lateral.values():
        channels, out = 16, lateral.out_channels
        lateral.weight = nn.Parameter(torch.randn(out, channels, 1, 1, generator=torch.Generator().manual_seed(3)))
    for (
        refine
    ) in model.pyramid.refine.values():  # a 3 x 3 kernel that is alike on both sides has its centre in the middle
        with torch.no_grad():
            refine.weight.copy_(refine.weight.mean((2, 3), keepdim=True).expand_as(refine.weight))
    return model


def test_an_efficientnet_looks_at_the_upper_left_of_what_it_claims():
    """A convolution of stride 2 is centred on pixel 2 i, a chain of them on i s + 0.5, (s - 1) / 2 too early."""
    model = small_model(backbone="efficientnet_b0", backbone_options={}, scales=(16, 32, 128), fpn_dim=64)
    offsets = cell_centres(model, (512, 512))
    assert list(offsets) == [16, 32, 128]
    assert offsets[16] == pytest.approx((-7.5, -7.5), abs=1.5)
    assert offsets[32] == pytest.approx((-15.5, -15.5), abs=3)
    assert offsets[128] == pytest.approx([offset - 48 for offset in offsets[32]])


def test_pooling_keeps_the_middle():
    offsets = cell_centres(with_toy(Pooling()), (64, 64))
    assert offsets[16] == pytest.approx((0, 0), abs=1e-3)
    assert offsets[32] == pytest.approx((0, 0), abs=1e-3)
    assert offsets[64] == pytest.approx((-16, -16), abs=1e-3)


@pytest.mark.parametrize("fixed_px", [None, 320])
def test_the_axes_are_not_mixed_up_and_a_fixed_size_of_image_will_do(fixed_px):
    model = with_toy(Sliced((4, 27), fixed_px), scales=(32, 128), inducing_points=(3, 3))
    assert model.pyramid.strides == (32,)
    offsets = cell_centres(model, (320, 320))
    assert offsets[32] == pytest.approx((4.5 - 16, 27.5 - 16))
    assert offsets[128] == pytest.approx((4.5 - 64, 27.5 - 64))


def test_nothing_of_the_network_changes_and_the_answer_repeats():
    model = small_model().train()
    set_trainable(model, 1)
    model.backbone.frozen_statistics = True
    model.backbone.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        first = cell_centres(model, (64, 64))
    torch.manual_seed(9)
    assert cell_centres(model, (64, 64)) == first
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"instance_encoder": "single", "scales": (64,)}, {"instance_encoder": "msp"}])
def test_a_tile_that_is_an_instance_stands_for_its_square(changes):
    model = small_model(**{"inducing_points": "auto", "scales": (32, 64), **changes})
    assert cell_centres(model, (64, 64)) == dict.fromkeys(model.scales, (0.0, 0.0))
