"""What the soak writes down (`python -m tests.faults.soak`)."""

from __future__ import annotations

from pathlib import Path

from tests.faults.soak_record import Kill, Soak, write_record


def test_the_record_counts_kills_by_where_they_struck(tmp_path: Path) -> None:
    kinds = {"run": 0, "ranks": 2, "workers": 0, "identical": True}
    kills = [
        Kill(**kinds, start=0, rank=1, place="start", others=(-15,)),
        Kill(**kinds, start=0, rank=0, place="step 4, save", others=(1,), half_written=True, goes_on=2),
        Kill(**kinds, start=2, rank=0, place="step 9", others=(1,), goes_on=8),
    ]
    soak = Soak(kills=kills, ends=[("DDP", True)], unbroken=2, left_behind=0, failed_starts=[])
    write_record(tmp_path / "record.md", soak, command="python -m tests.faults.soak", seconds=60)
    text = (tmp_path / "record.md").read_text()
    assert "| where the killed rank was | between phases of a step: 1, save: 1, start: 1 |" in text
    assert "| how the other ranks ended | by SIGTERM: 1, by itself: 2 |" in text
    assert "**1 of 1**" in text
    assert "| 2 | 0 | 2 | 0 | 0 | 0 | 0.00 | step 4, save | yes | by itself | 2 | yes |" in text


def test_one_record_leaves_the_other_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "record.md"
    for engine in ("DDP", "ZeRO 3", "DDP"):
        kill = Kill(run=0, engine=engine, ranks=2, workers=0, start=0, place="step 4, save")
        soak = Soak(kills=[kill], ends=[(engine, True)], unbroken=1, left_behind=0, failed_starts=[])
        write_record(file, soak, command=f"soak {engine}", seconds=60)
    ddp, zero = file.read_text().split("# The same")
    assert ("`soak DDP`" in ddp, "`soak ZeRO 3`" in zero) == (True, True)
    assert (ddp.count("`soak"), zero.count("`soak")) == (1, 1)
    assert "| of ZeRO 3: kills; runs bit-identical | 1; 1 of 1 |" in zero
    assert "| 1 | 0 | 2, ZeRO 3 |" in zero
