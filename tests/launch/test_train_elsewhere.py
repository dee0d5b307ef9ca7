"""Two ranks with two decoding processes each train from a web server as from the folder; each sample is sent once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.manifest import read_manifest
from tests.elsewhere import only, pack_large, times_sent
from tests.experiments import write_tiny
from tests.servers import serving
from tests.worlds import msmil


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    folder = pack_large(tmp_path / "packed")
    config = str(write_tiny(tmp_path, folder, train={"epochs": 2, "batch_size": 6, "precision": "fp32"}))
    assert msmil("train", config, "--ranks", "2", "--quiet").returncode == 0
    with serving(folder) as server:
        data = [f"shards={server.url}", f"cache_dir={tmp_path / 'cache'}", "cache_gb=0.1", "workers=2"]
        options = ["name=there", *(f"data.{word}" for word in data)]
        done = msmil("train", config, *options, "--ranks", "2", "--quiet")
        assert done.returncode == 0, done.stderr
        manifest = read_manifest(folder)
        used = np.concatenate([manifest.rows("train"), manifest.rows("val")])
        assert times_sent(manifest, server).tolist() == only(manifest, used)
        assert len(server.gets("samples.arrow")) == 1
    weights = [sorted((tmp_path / "runs" / name).glob("checkpoints/*/model.safetensors")) for name in ("tiny", "there")]
    assert weights[0]
    for here, there in zip(*weights, strict=True):
        assert here.parent.name == there.parent.name
        assert here.read_bytes() == there.read_bytes()
