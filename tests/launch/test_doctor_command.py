"""`msmil doctor`: lines for people, JSON for scripts, and an exit code that says the worst."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch.cli import main
from msmil.engine.doctor import examine
from msmil.engine.doctor.check import Check, broken, ok, warning
from msmil.engine.doctor.child import Answer
from tests.experiments import write_tiny

OK, WARNING = ok("Python", "3.12"), warning("GPUs", "none", "use a machine with one")
BROKEN = broken("torchvision", "does not fit torch", "install the one that does")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the examination finds, for a test to fill."""
    checks: list[Check] = []

    def examined(file: str | None, overrides: Sequence[str]) -> Iterator[Check]:
        yield from checks

    monkeypatch.setattr(examine, "examine", examined)
    return checks


@pytest.mark.parametrize(
    ("checks", "state", "code"),
    [([OK], "ok", 0), ([WARNING, OK], "warning", 1), ([OK, BROKEN, WARNING], "broken", 2)],
)
def test_the_exit_code_is_that_of_the_worst_line(
    checks: list[Check], state: str, code: int, found: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    found += checks
    assert main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == state
    assert [line["name"] for line in document["checks"]] == [check.name for check in checks]


def test_lines_for_people(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    found += [OK, WARNING, BROKEN]
    assert main(["doctor"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "ok       Python           3.12",
        "warning  GPUs             none",
        "                          fix: use a machine with one",
        "broken   torchvision      does not fit torch",
        "                          fix: install the one that does",
        "",
        "1 ok, 1 warning, 1 broken",
    ]
    assert main(["doctor", "--quiet"]) == 2
    assert "Python" not in capsys.readouterr().out


def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "none.yaml")]) == 2
    assert "no such configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_and_an_experiment_that_it_cannot_run(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examine, "_deepspeed", lambda _: Answer({}, "not asked in this test"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = write_tiny(tmp_path, packed, train={"batch_size": 600})
    assert main(["doctor", str(file), "--json"]) == 2
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("Python", "torch", "torchvision", "TensorBoard", "training code", "gloo", "output_dir", "shards"):
        assert lines[name]["state"] == "ok", lines[name]
    assert lines["gloo"]["text"].startswith("2 processes")
    assert "600" in lines["experiment"]["text"]
    assert [name for name, line in lines.items() if line["state"] == "broken"] == ["experiment"]
    assert not (tmp_path / "runs").exists()
