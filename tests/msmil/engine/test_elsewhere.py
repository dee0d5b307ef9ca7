"""Training from a web server is training from the folder, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import msmil.engine.train as engine
from launch.cli import main
from msmil.config_io import load_config
from msmil.engine.preflight import check_experiment
from msmil.engine.runtime import Runtime
from msmil.reporting.run_files import read_run
from msmil.reporting.sections.data import data_section
from shards.errors import UserError
from tests.experiments import write_tiny
from tests.runs import reset
from tests.servers import FileServer, serving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu")]


def trained(folder: Path, shards: str, **data: object) -> Path:
    folder.mkdir()
    options = {"data": {"labels": ["Mass", "Suspicious_Calcification"], "workers": 0} | data}
    config = load_config(write_tiny(folder, Path("unused"), **options), [f"data.shards={shards}"])
    check_experiment(config, 1)
    engine.train(config, Runtime(config.train))
    reset()
    return Path(config.output_dir) / config.name


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[FileServer]:
    with serving(packed) as server:
        yield server


@pytest.mark.usefixtures("blank_figures")
def test_weights_are_the_same(packed: Path, server: FileServer, tmp_path: Path) -> None:
    server.faults.extend(["drop", "flip", "busy"])
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.1}
    here, there = trained(tmp_path / "here", str(packed)), trained(tmp_path / "there", server.url, **cache)
    files = [next((run / "checkpoints").glob("step_*/model.safetensors")).name for run in (here, there)]
    steps = [sorted(path.name for path in (run / "checkpoints").glob("step_*")) for run in (here, there)]
    assert steps[0] == steps[1]
    for step in steps[0]:
        weights = [(run / "checkpoints" / step / files[0]).read_bytes() for run in (here, there)]
        assert weights[0] == weights[1]
    # the address stands in the run folder, its log and its report, and no folder of this machine takes its place
    assert json.loads((there / "data.json").read_text())["address"] == server.url
    assert "address" not in json.loads((here / "data.json").read_text())
    assert f"images: {server.url}, read through" in (there / "log.txt").read_text()
    assert f"Read from {server.url}." in data_section(read_run(there, name="there", split="test"), "").body


def test_a_cache_too_small_for_whole_shards_is_refused_before_anything_starts(packed: Path, tmp_path: Path) -> None:
    """The parent of the ranks checks it, too, when the server refuses ranges."""
    with serving(packed) as refusing:
        refusing.mode = "refuses"
        data = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 1e-4, "shuffle_block_shards": 2}
        config = load_config(write_tiny(tmp_path, Path("unused"), data=data), [f"data.shards={refusing.url}"])
        with pytest.raises(
            UserError, match=r"cache of 100\.0 kB does not hold the 4 that are read at a time"
        ) as caught:
            check_experiment(config, 2)
        assert "data.cache_gb" in caught.value.fix
        assert not refusing.gets()


@pytest.mark.parametrize("command", ["pack", "extract", "phantom"])
def test_an_address_is_refused_where_files_are_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"pack": ["--table", "a.csv", "--images", "b"], "extract": [], "phantom": []}[command]
    first = ["demo.yaml"] if command == "extract" else []
    with pytest.raises(SystemExit):
        main([command, *first, "s3://bucket/out", *arguments])
    assert "'s3://bucket/out' is an address" in capsys.readouterr().err


def test_verify_reads_an_address(server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", server.url, "--processes", "1", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == server.url
