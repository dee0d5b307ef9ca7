"""Intensities: the range of the stored type, local contrast without a rim at the air, standardised black."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from msmil.bags.normalise import gaussian_blur, local_contrast, standard_black, standardise, to_unit


@pytest.mark.parametrize(("dtype", "largest"), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_the_whole_range_of_the_stored_type_becomes_zero_to_one(dtype, largest):
    image = torch.tensor([0, 1, largest // 2, largest - 1, largest]).to(dtype).reshape(1, 1, 1, 5)
    x = to_unit(image)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([0, 1, largest // 2, largest - 1, largest]) / largest)
    assert x.flatten()[0] == 0
    assert x.flatten()[-1] == 1


def test_sixteen_bits_are_not_cut_to_eight():
    near = torch.tensor([40000, 40001]).to(torch.uint16).reshape(1, 1, 1, 2)
    assert to_unit(near).diff().item() == pytest.approx(1 / 65535, rel=1e-2)


def test_images_of_another_type_are_refused():
    with pytest.raises(AssertionError, match="uint8 or uint16"):
        to_unit(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0, 7.5])
def test_the_blur_is_the_gaussian_of_scipy(sigma):
    x = torch.rand(2, 1, 40, 55, generator=torch.Generator().manual_seed(1))
    radius = max(1, int(np.ceil(3 * sigma)))
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="constant", radius=(0, 0, radius, radius))
    torch.testing.assert_close(gaussian_blur(x, sigma), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)


def test_local_contrast_is_the_formula_where_no_air_is_near():
    x = 0.2 + 0.6 * torch.rand(1, 1, 60, 60, generator=torch.Generator().manual_seed(2))
    inner = (..., slice(10, 50), slice(10, 50))
    expected = x + 2 * (x - gaussian_blur(x, 3.0))
    torch.testing.assert_close(local_contrast(x, gain=2.0, sigma_px=3.0)[inner], expected[inner])


def test_an_even_breast_gets_no_bright_rim_at_the_air_or_at_the_edge_of_the_image():
    x = torch.zeros(1, 1, 40, 40)
    x[..., 8:, :25] = 0.3
    torch.testing.assert_close(local_contrast(x, gain=2.0, sigma_px=3.0), x, atol=1e-5, rtol=0)


def test_air_stays_black_beside_tissue():
    x = torch.zeros(1, 1, 40, 40)
    x[..., :20] = 0.1 + 0.5 * torch.rand(40, 20, generator=torch.Generator().manual_seed(3))
    assert (local_contrast(x, gain=2.0, sigma_px=3.0)[..., 20:] == 0).all()


def test_a_small_bright_spot_gains_contrast():
    x = torch.full((1, 1, 40, 40), 0.3)
    x[..., 20, 20] = 0.5
    out = local_contrast(x, gain=2.0, sigma_px=3.0)
    assert out[0, 0, 20, 20] - out[0, 0, 5, 5] > 2.5 * 0.2


def test_an_all_black_image_stays_all_black():
    x = to_unit(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert (local_contrast(x, gain=2.0, sigma_px=3.0) == 0).all()


def test_standardising_maps_mean_to_zero_and_black_to_the_fill_value():
    x = torch.tensor([0.0, 0.3089279, 0.3089279 + 0.25053555408335154]).reshape(1, 1, 1, 3)
    out = standardise(x, mean=0.3089279, std=0.25053555408335154).flatten()
    torch.testing.assert_close(out, torch.tensor([-1.2330701, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert standard_black(0.3089279, 0.25053555408335154) == pytest.approx(-1.2330701351165771, abs=1e-7)
