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
    soak = Soak(kills=kills, runs=1, identical=1, unbroken=2, left_behind=0, failed_starts=[])
    write_record(tmp_path / "record.md", soak, wanted=3, seed=1, seconds=60)
    text = (tmp_path / "record.md").read_text()
    assert "| where the killed rank was | between phases of a step: 1, save: 1, start: 1 |" in text
    assert "| how the other ranks ended | by SIGTERM: 1, by itself: 2 |" in text
    assert "**1 of 1**" in text
    assert "| 2 | 0 | 2 | 0 | 0 | 0 | 0.00 | step 4, save | yes | by itself | 2 | yes |" in text
