"""The benchmark of the order runs, on fewer images."""

from __future__ import annotations

import pytest

from tests.benchmarks.order import ORDERS, main


@pytest.mark.slow
def test_it_prints_a_line_per_order_within_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--images", "20000", "--ranks", "16", "--batch-size", "64"])
    first, _, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "20000 images, 16 ranks x 8 decoding processes, global batches of 64"
    assert [line[:21].strip() for line in lines] == [*ORDERS, "DistributedSampler"]
    assert not any("beyond" in line for line in lines)
    steps = {name: int(line[21:].split()[0]) for name, line in zip(ORDERS, lines[:-1], strict=True)}
    assert steps["uniform, pad"] == steps["class_balanced"] == 313
    assert steps["uniform, drop"] == 312
