"""The figure of the method is the one that its script draws."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.pages import ROOT
from tests.worlds import run

IMAGES = ROOT / "docs" / "images"


@pytest.mark.slow
def test_the_method_is_drawn_by_its_script(tmp_path: Path) -> None:
    out = tmp_path / "method.png"
    done = run([sys.executable, "docs/figures/method.py", str(out)], deadline_s=60)
    assert done.returncode == 0, done.stderr
    drawn, stored = (np.asarray(Image.open(file).convert("RGB"), np.float32) for file in (out, IMAGES / "method.png"))
    assert drawn.shape == stored.shape
    # fonts differ a little between versions of matplotlib
    assert np.abs(drawn - stored).mean() < 2


def test_pictures_are_small_enough_for_a_repository() -> None:
    assert all(file.stat().st_size < 200_000 for file in IMAGES.iterdir())
