"""`msmil doctor --collectives`: ranks see each other, sums are right; a rank that does not come is named."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from launch.cli import main
from msmil.engine.doctor import collectives
from tests.worlds import ROOT, environment, torchrun

COMMAND = [sys.executable, "-m", "launch.cli", "doctor", "--collectives"]


def test_without_a_launcher_a_process_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--collectives"]) == 0
    assert "alone" in capsys.readouterr().out


def test_a_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--collectives", "configs/experiment/demo.yaml"]) == 2
    assert "looks at no experiment" in capsys.readouterr().err


@pytest.mark.long
def test_ranks_of_torchrun_talk_rightly_and_at_a_measured_speed() -> None:
    said = json.loads(torchrun("launch.cli", ["doctor", "--collectives", "--json"], ranks=2))
    assert said["state"] == "ok"
    lines = {line["name"]: line["text"] for line in said["checks"]}
    assert lines["ranks"].startswith("2 ranks see each other: 2 on ")
    assert lines["sums"] == "right: all_reduce, broadcast, all_gather, reduce_scatter"
    sizes = [name for name in lines if name.startswith("sum of ")]
    assert sizes == [f"sum of {size // collectives.MEGABYTE} MB" for size in collectives.SIZES]
    assert all("GB/s, bus " in lines[name] for name in sizes)


def start(rank: int, world: int, port: int, timeout_s: int) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [*COMMAND, "--timeout", str(timeout_s)],
        env=environment(**variables, **place, COLUMNS="200"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("there", "named"), [((0, 1), "rank 2 of 3 did not answer within 8 s"), ((1,), "rank 0 does not answer at 127.0")]
)
def test_a_rank_that_does_not_come_is_named_once(there: tuple[int, ...], named: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rank, 3, port, 8) for rank in there]
    said = [process.communicate(timeout=90) for process in ranks]
    assert [process.returncode for process in ranks] == [2] * len(there)
    everything = "".join(out + err for out, err in said)
    assert everything.count(named) == 1, everything
    assert "Traceback" not in everything
