"""The computed memory of a training step is that of a real one, and the README's table is what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from msmil.config_io import config_from_dict
from tests.benchmarks.memory import main, network_as_trained, peak_bytes, step_bytes
from tests.experiments import TINY

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_tensors_without_numbers_take_what_real_ones_take() -> None:
    # recomputed activations come and go, and are counted as they do
    train = TINY["train"] | {"gradient_checkpointing": True, "channels_last": False}
    config = config_from_dict(TINY | {"train": train})
    computed = step_bytes(config, (128, 96), [1, 3])
    torch.manual_seed(0)
    network = network_as_trained(config, (128, 96))
    assert computed == [peak_bytes(network, config, (128, 96), images) for images in (1, 3)]
    assert computed[1] > 1.5 * computed[0]


def test_a_row_of_the_readme_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", "FPN-AbMIL, last 8 blocks train", "--images", "1"])
    *_, row = capsys.readouterr().out.splitlines()
    name, *printed = row.strip("| ").split(" | ")
    (written,) = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", README, flags=re.MULTILINE)
    numbers = [[float(cell.removesuffix(" GB")) for cell in cells] for cells in (printed, written.split(" | "))]
    assert numbers[0] == pytest.approx(numbers[1][: len(numbers[0])], rel=0.03)
