"""The benchmark of variants runs, and the encoders see as many pixels as the method says."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.variants import PLAIN, experiments, main, make_variant

pytestmark = pytest.mark.slow

WHOLE = 1536 * 1024  # 1520 x 912, padded


def test_every_network_is_measured_once() -> None:
    names = [file.stem for file in experiments()]
    assert names[0] == PLAIN
    assert len(names) == 14, "of the paper's 22 rows; the others are the same network for the other label"
    assert {"mass_msp_abmil", "calcification_nested_settrans", "calcification_single_abmil"} <= set(names)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        (PLAIN, WHOLE),
        ("calcification_single_abmil", WHOLE),
        ("mass_nested_abmil", WHOLE),
        ("mass_msp_abmil", 96 * 128**2 + 24 * 256**2 + 12 * 384**2),
    ],
)
def test_pixels_that_an_encoder_sees(name: str, pixels: int) -> None:
    file = next(file for file in experiments() if file.stem == name)
    variant = make_variant(file, torch.device("cpu"), stored_hw=(1520, 912), images=1, backbone="test_efficientnet")
    assert variant.pixels == pixels


def test_it_prints_a_line_per_variant(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--height", "128", "--width", "128", "--rounds", "1", "--backbone", "test_efficientnet"]
    main([*small, "--device", "cpu", "--only", "nested"])
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert "MB/image" in head
    assert [line.split()[0] for line in lines] == [PLAIN, "calcification_nested_settrans", "mass_nested_abmil"]
    assert all(float(number) > 0 for line in lines for number in line.split()[1:4])
