"""`msmil bench scaling`: measured ranks and projected GPUs, from one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.alone import one_rank_in_this_process
from tests.experiments import write_tiny
from tests.worlds import msmil

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path, packed: Path) -> str:
    return str(write_tiny(tmp_path, packed))


def test_one_rank_is_measured_and_more_are_projected(config: str, tmp_path: Path) -> None:
    with one_rank_in_this_process():
        done = msmil("bench", "scaling", config, "--ranks", "1", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (one,) = told["measured"]
    assert (one["ranks"], one["images_per_rank"], one["efficiency"], one["sent_bytes"]) == (1, 6, 1.0, 0)
    assert 0 < one["backward_s"] < one["step_s"] * 2
    rows = {(row["engine"], row["overlap"], row["ranks"]) for row in told["projected"]}
    assert {("ddp", True, 8), ("ddp", False, 512), ("zero3", False, 64)} <= rows
    assert told["reading"]["decode_s"] > 0
    assert not (tmp_path / "runs").exists(), "nothing is saved"


def test_times_of_another_machine_are_projected_without_a_rank(config: str) -> None:
    words = ["--ranks", "1", "--images", "8", "--step-ms", "80", "--backward-ms", "50"]
    done = msmil("bench", "scaling", config, *words, "--gpu-link", "100", "--node-link", "5")
    assert done.returncode == 0, done.stderr
    assert "100 GB/s between GPUs, 5 GB/s between machines" in done.stdout
    assert "projected from the step of one rank (80.0 ms" in done.stdout
    assert "uses 100.0 images/s" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpu-link", "100"], "--node-link"),
        (["--step-ms", "80"], "--backward-ms"),
        (["--step-ms", "80", "--backward-ms", "90"], "smaller part"),
        (["--ranks", "4"], "not divided by 4 ranks"),
    ],
)
def test_what_does_not_fit_together_is_one_line(config: str, words: list[str], named: str) -> None:
    done = msmil("bench", "scaling", config, "--ranks", "1", *words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_two_ranks_send_what_the_formula_says(config: str) -> None:
    done = msmil("bench", "scaling", config, "--ranks", "2", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    one, two = told["measured"]
    assert (one["ranks"], two["ranks"], one["images_per_rank"], two["images_per_rank"]) == (1, 2, 3, 3)
    assert two["sent_bytes"] == pytest.approx(two["formula_bytes"], rel=0.01)
    assert two["alone_s"] > 0
    assert two["efficiency"] == pytest.approx(two["images_per_s"] / (2 * one["images_per_s"]))
