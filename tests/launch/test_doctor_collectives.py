"""`msmil doctor --collectives`: ranks see each other, sums are right; a rank that does not come is named."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from msmil.engine.doctor import collectives
from tests import forked
from tests.worlds import environment, torchrun


def test_without_a_launcher_a_process_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--collectives"]) == 0
    assert "alone" in capsys.readouterr().out


def test_a_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--collectives", "configs/experiment/demo.yaml"]) == 2
    assert "looks at no experiment" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_talk_rightly_and_at_a_measured_speed() -> None:
    said = json.loads(torchrun("launch.cli", ["doctor", "--collectives", "--json"], ranks=2))
    assert said["state"] == "ok"
    lines = {line["name"]: line["text"] for line in said["checks"]}
    assert lines["ranks"].startswith("2 ranks see each other: 2 on ")
    assert lines["sums"] == "right: all_reduce, broadcast, all_gather, reduce_scatter"
    sizes = [name for name in lines if name.startswith("sum of ")]
    assert sizes == [f"sum of {size // collectives.MEGABYTE} MB" for size in collectives.SIZES]
    assert all("GB/s, bus " in lines[name] for name in sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "named"), [((0, 1), "rank 2 of 3 did not answer within 6 s"), ((1,), "rank 0 does not answer at 127.0")]
)
def test_a_rank_that_does_not_come_is_named_once(
    there: tuple[int, ...], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = forked.rank_environments(environment(COLUMNS="200"), 3)
    forked.start_ranks("launch.cli", ["doctor", "--collectives", "--timeout", "6"], [ranks[rank] for rank in there])
    assert forked.wait_for_ranks(deadline_s=90, end_others=False)["codes"] == [2] * len(there)
    everything = "".join(capfd.readouterr())
    assert everything.count(named) == 1, everything
    assert "Traceback" not in everything
