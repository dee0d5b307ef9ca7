"""Augmentation is a function of (seed, epoch, sample), keeps air black and intensities in 0..1."""

from __future__ import annotations

import math

import pytest
import torch

from msmil.bags.augment import apply, draw
from msmil.config import AugmentConfig

STILL = {"horizontal_flip": 0.0, "vertical_flip": 0.0}
OPTIONS = {
    "flips": AugmentConfig(),
    "geometry": AugmentConfig(rotation_deg=20.0, scale=0.2),
    "intensity": AugmentConfig(gamma=0.3, gain=0.2, offset=0.1),
    "noise": AugmentConfig(**STILL, noise_sd=0.05),
    "cutout": AugmentConfig(**STILL, cutout_count=3, cutout_px=7),
    "everything": AugmentConfig(
        rotation_deg=15.0, scale=0.1, gamma=0.3, gain=0.2, offset=0.1, noise_sd=0.03, cutout_count=2, cutout_px=9
    ),
}
every_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())


def images(count, height=37, width=29, seed=0):
    """Tissue in a part of the image, air (0) in the rest."""
    x = torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    x[..., width * 2 // 3 :] = 0
    return x


def augmented(x, config, samples, seed=1, epoch=0):
    return apply(x, draw(config, seed=seed, epoch=epoch, sample_B=torch.tensor(samples)))


def one(config, **values):
    """A draw for one image with the given values in place of the drawn ones."""
    drawn = draw(config, seed=0, epoch=0, sample_B=torch.tensor([0]))
    neutral = {"flip_h_B": False, "flip_v_B": False, "angle_B": 0.0, "scale_B": 1.0}
    fields = {name: getattr(drawn, name) for name in drawn.__slots__}
    fields |= {name: torch.tensor([value]) for name, value in (neutral | values).items()}
    return type(drawn)(**fields)


@every_option
def test_a_sample_is_changed_the_same_way_alone_and_in_any_batch(config):
    x, samples = images(5), [900, 17, 3, 2**40, 0]
    together = augmented(x, config, samples)
    order = [3, 1, 4, 0]
    shuffled = augmented(x[order], config, [samples[i] for i in order])
    for place, i in enumerate(order):
        alone = augmented(x[i : i + 1], config, samples[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(shuffled[place], together[i], atol=1e-6, rtol=0)


@every_option
def test_the_same_seed_epoch_and_sample_give_the_same_image(config):
    assert torch.equal(augmented(images(4), config, [1, 2, 3, 4]), augmented(images(4), config, [1, 2, 3, 4]))


@every_option
def test_other_seeds_epochs_and_samples_give_other_images(config):
    x = images(1).expand(24, -1, -1, -1)
    samples = list(range(24))
    first = augmented(x, config, samples)
    for other in (
        augmented(x, config, samples, seed=2),
        augmented(x, config, samples, epoch=1),
        augmented(x, config, [s + 24 for s in samples]),
    ):
        assert sum(not torch.equal(a, b) for a, b in zip(first, other, strict=True)) > 8


@every_option
def test_torchs_global_generator_is_left_alone(config):
    before = torch.get_rng_state()
    augmented(images(3), config, [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), before)


@every_option
def test_the_input_is_not_changed(config):
    x = images(3)
    kept = x.clone()
    augmented(x, config, [1, 2, 3])
    assert torch.equal(x, kept)


@every_option
def test_intensities_stay_in_range_and_black_images_stay_black(config):
    out = augmented(images(6), config, list(range(6)))
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert (augmented(torch.zeros(3, 1, 20, 20), config, [1, 2, 3]) == 0).all()


@pytest.mark.parametrize("config", [OPTIONS["intensity"], OPTIONS["noise"]], ids=["intensity", "noise"])
def test_air_stays_black_and_tissue_stays_tissue(config):
    config = AugmentConfig(**(vars(config) | STILL | {"offset": 0.5}))
    x = images(8)
    out = augmented(x, config, list(range(8)))
    assert torch.equal(out > 0, x > 0)
    assert not torch.equal(out, x)


@pytest.mark.parametrize(("option", "dim"), [("horizontal_flip", 3), ("vertical_flip", 2)])
def test_a_flip_is_exact_and_twice_is_nothing(option, dim):
    config = AugmentConfig(**(STILL | {option: 1.0}))
    x = images(3)
    once = augmented(x, config, [1, 2, 3])
    assert torch.equal(once, x.flip(dim))
    assert torch.equal(augmented(once, config, [1, 2, 3]), x)


def test_flips_come_as_often_as_asked_and_independently():
    drawn = draw(AugmentConfig(horizontal_flip=0.5, vertical_flip=0.25), seed=5, epoch=0, sample_B=torch.arange(4000))
    assert drawn.flip_h_B.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.flip_v_B.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (drawn.flip_h_B & drawn.flip_v_B).float().mean().item() == pytest.approx(0.125, abs=0.03)


def test_draws_fill_the_ranges_of_the_configuration():
    config = AugmentConfig(rotation_deg=10, scale=0.2, gamma=0.3, gain=0.1, offset=0.05, noise_sd=0.02)
    drawn = draw(config, seed=5, epoch=0, sample_B=torch.arange(4000))
    for values, low, high in (
        (drawn.angle_B, -math.radians(10), math.radians(10)),
        (drawn.scale_B, 0.8, 1.2),
        (drawn.gamma_B.log(), -0.3, 0.3),
        (drawn.gain_B, 0.9, 1.1),
        (drawn.offset_B, -0.05, 0.05),
        (drawn.noise_sd_B, 0.0, 0.02),
    ):
        span = high - low
        assert low - 1e-6 <= values.min() < low + 0.01 * span
        assert high - 0.01 * span < values.max() <= high + 1e-6


def test_switching_an_option_on_leaves_the_other_draws_alone():
    some, more = (draw(c, seed=1, epoch=2, sample_B=torch.arange(9)) for c in (OPTIONS["flips"], OPTIONS["everything"]))
    assert torch.equal(some.flip_h_B, more.flip_h_B)
    assert torch.equal(some.flip_v_B, more.flip_v_B)
    assert torch.equal(some.noise_seed_B, more.noise_seed_B)


def test_draws_are_what_they_were_when_runs_were_first_recorded():
    drawn = draw(AugmentConfig(rotation_deg=180, cutout_count=1), seed=0, epoch=0, sample_B=torch.tensor([0, 1]))
    torch.testing.assert_close(drawn.angle_B, torch.tensor([1.15504301, -1.74854767]))
    torch.testing.assert_close(
        drawn.cutout_BR2.flatten(), torch.tensor([0.00449811, 0.63314658, 0.55542779, 0.78754526])
    )
    assert drawn.noise_seed_B.tolist() == [120421229594553, 68098068928760]


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_right_angles_and_flips_by_the_grid_are_exact(turn, flips):
    x = images(1, 20, 20)
    drawn = one(OPTIONS["geometry"], angle_B=turn * math.pi / 2, flip_h_B=flips[0], flip_v_B=flips[1])
    dims = [dim for dim, flip in zip((3, 2), flips, strict=True) if flip]
    expected = x.flip(dims).rot90(turn, dims=(2, 3))  # rot90 turns counter-clockwise
    torch.testing.assert_close(apply(x, drawn), expected, atol=1e-4, rtol=0)


def test_a_rotation_keeps_lengths_in_an_oblong_image():
    x = torch.zeros(1, 1, 80, 40)
    x[..., 30:51, 18:22] = 1.0  # a vertical bar through the centre becomes a horizontal one, as long and as wide
    out = apply(x, one(OPTIONS["geometry"], angle_B=math.pi / 2))
    assert out.sum().item() == pytest.approx(x.sum().item(), rel=0.02)
    assert (out[0, 0].amax(0) > 0.5).sum().item() in (20, 21, 22)
    assert (out[0, 0].amax(1) > 0.5).sum().item() in (3, 4, 5)


def test_scale_makes_things_larger():
    x = torch.zeros(1, 1, 60, 60)
    x[..., 25:35, 25:35] = 1.0
    assert apply(x, one(OPTIONS["geometry"], scale_B=2.0)).sum().item() == pytest.approx(400, rel=0.05)


def test_what_rotates_in_from_outside_is_black():
    out = apply(torch.ones(1, 1, 40, 20), one(OPTIONS["geometry"], angle_B=math.pi / 2))
    assert (out[..., :9, :] == 0).all()
    assert (out[..., 20, :] == 1).all()


def test_gamma_gain_and_offset_are_applied_in_this_order():
    config = AugmentConfig(gamma=1.0, gain=0.5, offset=0.5)
    drawn = one(config, gamma_B=2.0, gain_B=1.2, offset_B=-0.1)
    out = apply(torch.tensor([0.5, 1.0, 0.0]).reshape(1, 1, 1, 3), drawn)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5**2 * 1.2 - 0.1, 1.0, 0.0]))


def test_noise_has_the_drawn_deviation_and_differs_between_samples():
    x = torch.full((2, 1, 200, 200), 0.5)
    config = AugmentConfig(**STILL, noise_sd=0.1)
    drawn = draw(config, seed=3, epoch=0, sample_B=torch.tensor([4, 5]))
    noise = apply(x, drawn) - x
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), drawn.noise_sd_B, rtol=0.03, atol=0)
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1].item()) < 0.03


def test_cutout_blackens_squares_of_the_asked_size():
    config = AugmentConfig(**STILL, cutout_count=1, cutout_px=6)
    out = augmented(torch.ones(200, 1, 40, 30), config, list(range(200)))
    holes = (out == 0)[:, 0]
    areas = holes.sum(dim=(1, 2))
    assert areas.max() == 36
    assert (areas == 36).float().mean() > 0.5  # the others reach over the border
    for hole, area in zip(holes, areas, strict=True):
        assert hole.any(0).sum() * hole.any(1).sum() == area  # one rectangle
    assert holes.any(0).float().mean() > 0.95  # anywhere


def test_without_options_nothing_happens():
    x = images(3)
    assert torch.equal(augmented(x, AugmentConfig(**STILL), [1, 2, 3]), x)
