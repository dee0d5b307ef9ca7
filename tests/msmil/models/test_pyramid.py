from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from msmil.models.pyramid import FeaturePyramid


def maps(*sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *size, generator=generator) for size in sizes]


def test_three_levels_are_the_formula() -> None:
    """From the coarsest: lateral + nearest upsampling of the merged (not the refined) coarser level, then refine."""
    pyramid = FeaturePyramid(scales=(8, 16, 32), strides=(8, 16, 32), channels=(3, 4, 5), dim=6)
    fine, middle, coarse = maps((3, 8, 12), (4, 4, 6), (5, 2, 3))

    def lateral(stride: int, x: torch.Tensor) -> torch.Tensor:
        conv = pyramid.lateral[str(stride)]
        return torch.einsum("mchw,dc->mdhw", x, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]

    def refine(stride: int, x: torch.Tensor) -> torch.Tensor:
        conv = pyramid.refine[str(stride)]
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1)), conv.weight, conv.bias)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    p32 = lateral(32, coarse)
    p16 = lateral(16, middle) + double(p32)
    p8 = lateral(8, fine) + double(p16)
    levels = pyramid.levels([fine, middle, coarse])
    assert list(levels) == [8, 16, 32]
    for stride, merged in ((8, p8), (16, p16), (32, p32)):
        torch.testing.assert_close(levels[stride], refine(stride, merged), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 8), (3, 5)])
def test_coarser_scales_subsample_the_refined_coarsest_map(size: tuple[int, int]) -> None:
    pyramid = FeaturePyramid(scales=(16, 32, 64, 128), strides=(16, 32), channels=(3, 4), dim=5)
    levels = pyramid.levels(maps((3, 2 * size[0], 2 * size[1]), (4, *size)))
    assert torch.equal(levels[64], levels[32][:, :, ::2, ::2])
    assert torch.equal(levels[128], levels[32][:, :, ::4, ::4])


def test_coarser_scales_have_no_parameters() -> None:
    def count(scales: tuple[int, ...]) -> int:
        pyramid = FeaturePyramid(scales=scales, strides=(16, 32), channels=(3, 4), dim=5)
        return sum(p.numel() for p in pyramid.parameters())

    assert count((16, 32, 128)) == count((16, 32)) == (3 + 1) * 5 + (4 + 1) * 5 + 2 * (9 * 5 + 1) * 5


def test_a_finer_level_sees_the_coarser_ones_and_not_the_other_way_round() -> None:
    pyramid = FeaturePyramid(scales=(16, 32), strides=(16, 32), channels=(3, 4), dim=5)
    fine, coarse = (m.requires_grad_() for m in maps((3, 4, 4), (4, 2, 2)))
    levels = pyramid.levels([fine, coarse])
    assert torch.autograd.grad(levels[16].sum(), coarse, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(levels[32].sum(), fine, allow_unused=True)[0] is None
