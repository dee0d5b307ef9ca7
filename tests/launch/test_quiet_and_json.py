"""`--quiet` leaves errors and results, `--json` leaves one JSON document on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import evaluate, extract, train
from launch.cli import main
from msmil.config import Config
from tests.archives import GroupedArchive
from tests.experiments import write_tiny
from tests.msmil.engine.test_train import reset

Capture = pytest.CaptureFixture[str]


def document(capsys: Capture) -> tuple[Any, str]:
    """The one JSON document on stdout, and stderr."""
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def packing(archive: GroupedArchive, out: Path) -> list[str]:
    return ["pack", str(out), "--table", str(archive.table), "--images", str(archive.images), "--processes", "1"]


def test_pack_and_verify(tiny_archive: GroupedArchive, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main([*packing(tiny_archive, out), "--json", "--quiet"]) == 0
    packed, err = document(capsys)
    assert err == ""
    manifest = json.loads((out / "manifest.json").read_text())
    assert packed["fingerprint"] == manifest["fingerprint"]
    assert packed["counts"] == manifest["counts"]
    assert packed["num_shards"] == len(manifest["shards"])
    assert packed["num_bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert main(["verify", str(out), "--json", "--processes", "1"]) == 0
    verified, err = document(capsys)
    assert (verified["ok"], verified["images"], verified["problems"]) == (True, 24, [])
    assert "verifying" in err, "progress goes elsewhere"
    (out / "foreign.tar").touch()
    assert main(["verify", str(out), "--json", "--quiet", "--processes", "1"]) == 2
    assert document(capsys)[0]["problems"] == [{"file": "foreign.tar", "thing": "is not named by manifest.json"}]


def test_an_error_is_no_document(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", str(tmp_path), "--json", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("msmil: error: ")


def test_an_extraction_has_no_document_but_its_sizes(capsys: Capture) -> None:
    assert main(["extract", "configs/experiment/demo.yaml", "OUT", "--json"]) == 2
    assert "add --sizes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "extract"])
def test_ranks_hear_of_it(command: str, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on: list[str] = []
    module = {"train": train, "evaluate": evaluate, "extract": extract}[command]
    monkeypatch.setattr(module, "start_ranks", lambda _, arguments, **__: handed_on.extend(arguments) or 0)
    monkeypatch.setattr("msmil.engine.preflight.check_experiment", lambda *_: None)
    monkeypatch.setattr("msmil.engine.evaluate.find_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr("msmil.engine.checkpoint_state.read_state", lambda _: (None, None))
    monkeypatch.setattr("msmil.engine.data.check_trained_on", lambda *_: None)
    file = write_tiny(tmp_path, packed)
    (tmp_path / "config.yaml").write_text(file.read_text())
    more = {"train": [str(file)], "evaluate": [str(tmp_path), "--json"], "extract": [str(file), "OUT"]}[command]
    assert main([command, *more, "--quiet", "--ranks", "1"]) == 0
    assert "--quiet" in handed_on
    assert ("--json" in handed_on) == (command == "evaluate")


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"batch_norm": "sync"}])
def test_that_there_is_no_gpu_is_said_once_by_all_ranks(
    quiet: bool,
    settings: dict[str, str],
    tmp_path: Path,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    file = write_tiny(tmp_path, packed, train=settings, data={"last_batch": "drop"})
    (tmp_path / "config.yaml").write_text(file.read_text())
    told = [nullcontext(SimpleNamespace(is_main=rank == 0)) for rank in (0, 1)]
    ranks, used = iter(told), []

    def two_ranks(_: str, arguments: list[str], **__: object) -> int:
        return sum(evaluate.rank_main(arguments) for _ in told)

    def evaluated(config: Config, *_: object, **__: object) -> dict[str, Any]:
        used.append((config.train.precision, config.train.batch_norm))
        return {"localisation": {}}

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(evaluate, "start_ranks", two_ranks)
    monkeypatch.setattr("msmil.engine.runtime.Runtime", lambda *_, **__: next(ranks))
    monkeypatch.setattr("msmil.engine.evaluate.evaluate", evaluated)
    monkeypatch.setattr("msmil.evaluation.results.results_table", lambda *_: "")
    monkeypatch.setattr("msmil.engine.evaluate.find_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr("msmil.engine.checkpoint_state.read_state", lambda _: (None, None))
    monkeypatch.setattr("msmil.engine.data.check_trained_on", lambda *_: None)
    assert main(["evaluate", str(tmp_path), "--json", "--ranks", "2", *["--quiet"] * quiet]) == 0
    assert capsys.readouterr().err.count("no GPU here: evaluating in fp32") == (0 if quiet else 1)
    assert [precision for precision, _ in used] == ["fp32", "fp32"]
    assert "sync" not in {batch_norm for _, batch_norm in used}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """One rank in this process, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def rank(program: Callable[[list[str]], int], *arguments: object) -> int:
        reset()
        return program([str(argument) for argument in arguments])

    yield rank
    torch.set_num_threads(threads)
    reset()


@pytest.mark.slow
def test_train_evaluate_and_sizes(tmp_path: Path, packed: Path, alone: Callable[..., int], capsys: Capture) -> None:
    config = write_tiny(tmp_path, packed, train={"epochs": 1})
    folder = tmp_path / "runs" / "tiny"
    assert alone(train.rank_main, config, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert "epoch 1 of 1: loss" in (folder / "log.txt").read_text(), "the log has all of it"
    assert alone(evaluate.rank_main, folder, "--quiet", "--json") == 0
    results, err = document(capsys)
    assert err == ""
    assert results == json.loads((folder / "metrics" / "test.json").read_text())
    assert alone(extract.rank_main, config, tmp_path / "out", "--sizes", "--json", "--quiet") == 0
    sizes, err = document(capsys)
    assert err == ""
    assert sizes["images"] == 96
    assert {(way["dtype"], way["zstd"]) for way in sizes["ways"]} >= {("fp32", False), ("bf16", True)}
    assert all(way["all_bytes"] == 96 * way["image_bytes"] for way in sizes["ways"])
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (row,), _ = document(capsys)
    assert (row["state"], row["epoch"], row["step"]) == ("evaluated", 1, row["total_steps"])
    assert row["test_auroc"] == results["mean_auroc"]
    assert row["best_auroc"] == pytest.approx(results["validation"]["mean_auroc"])
