"""`msmil pack` and `msmil verify` as a user runs them."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import build_parser
from shards.manifest import read_manifest
from tests.archives import GroupedArchive, write_csv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def msmil(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    program = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False, cwd="/")


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failed command."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("packing:", "verifying:"))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("msmil: error: ")
    assert " Fix: " in lines[0]
    return lines[0]


def arguments(archive: GroupedArchive, out: Path) -> list[object]:
    return ["pack", out, "--table", archive.table, "--images", archive.images]


def test_pack_then_verify(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = msmil(*arguments(tiny_archive, out), "--labels", "Mass", "--samples-per-shard", 8, "--processes", 2)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["train", "val", "test", "all"] in rows
    assert any(row[:1] == ["images"] and row[-1] == "24" for row in rows)
    assert any(row[:2] == ["Mass", "positive"] for row in rows)
    assert "packing: 24/24 images (100 %)" in done.stderr
    assert "Traceback" not in done.stderr
    manifest = read_manifest(out)
    assert manifest.labels == ("Mass",)
    assert max(shard.num_samples for shard in manifest.shards) <= 8

    checked = msmil("verify", out)
    assert checked.returncode == 0, checked.stderr
    assert "24 images" in checked.stdout
    assert "all as packed" in checked.stdout


def test_verify_exits_with_2_and_names_what_is_broken(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert msmil(*arguments(tiny_archive, out), "--quiet", "--processes", 1).returncode == 0
    tar = out / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    done = msmil("verify", out, "--quiet", "--processes", 1)
    assert done.returncode == 2
    assert "shard-000000.tar  truncated: 5000 bytes instead of" in done.stdout
    assert done.stderr == ""


def test_quiet_says_nothing(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    done = msmil(*arguments(tiny_archive, tmp_path / "out"), "--quiet", "--processes", 1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_option_reaches_the_packed_folder(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    options = ["--recipe", "mammoclip", "--height", 40, "--width", 30, "--codec", "zstd", "--seed", 3]
    options += ["--validation-fold", 1, "--labels", "Suspicious_Calcification", "Mass", "--on-broken", "drop"]
    tiny_archive.path(0).unlink()
    done = msmil(*arguments(tiny_archive, tmp_path / "out"), *options, "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 images, file is missing" in done.stdout
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.height_px, manifest.width_px, manifest.codec) == (40, 30, "zstd")
    assert manifest.labels == ("Suspicious_Calcification", "Mass")
    assert manifest.recipe["name"] == "mammoclip"
    assert manifest.header.settings["seed"] == 3
    assert {manifest.record(row).fold for row in manifest.rows("val").tolist()} == {1}


def test_a_folder_of_images_with_boxes(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    rows = [
        {"image": f"{row['patient_id']}/{row['image_id']}.png", "patient_id": row["patient_id"]}
        | {"laterality": row["laterality"], "view": row["view"], "Cancer": row["Mass"]}
        for row in tiny_archive.rows
    ]
    positive = next(row for row in rows if row["Cancer"] == "1")
    table = write_csv(tmp_path / "mine.csv", rows)
    corners = {"x0": "1", "y0": "2", "x1": "10", "y1": "20"}
    boxes = write_csv(tmp_path / "boxes.csv", [{"image": positive["image"], "label": "Cancer", **corners}])
    folder = ["--source", "folder", "--table", table, "--images", tiny_archive.images, "--boxes", boxes]
    done = msmil("pack", tmp_path / "out", *folder, "--validation-fraction", 0.5, "--processes", 1)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.labels == ("Cancer",)
    assert manifest.header.counts["images"] == {"train": 12, "val": 12, "test": 0}
    assert sum(manifest.header.counts["boxes"]["Cancer"].values()) == 1


def test_errors_are_one_line_with_exit_code_2(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    command = arguments(tiny_archive, tmp_path / "out")
    assert "is no folder" in error_of(msmil(*command, "--images", tmp_path / "nowhere"))
    assert "the table is missing" in error_of(msmil(*command, "--table", tmp_path / "nowhere.csv"))
    tiny_archive.path(5).write_bytes(tiny_archive.path(5).read_bytes()[:300])
    message = error_of(msmil(*command, "--processes", 2))
    assert str(tiny_archive.path(5)) in message
    assert "--on-broken drop" in message
    tiny_archive.rows[3]["Mass"] = "maybe"
    tiny_archive.write_table()
    message = error_of(msmil(*command))
    assert str(tiny_archive.table) in message
    assert "row 4" in message
    assert "column Mass: 'maybe' is not 0, 1 or empty" in message
    assert "there is no manifest.json" in error_of(msmil("verify", tmp_path))


def options_of(command: str) -> dict[str, str | None]:
    """All options of a command with their help."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return {option: action.help for action in actions for option in action.option_strings}


@pytest.mark.parametrize("command", ["pack", "verify", "phantom"])
def test_help_names_every_option_and_its_meaning(command: str) -> None:
    done = msmil(command, "--help")
    assert done.returncode == 0
    options = options_of(command)
    assert {"--help", "--processes", "--quiet"} <= set(options)
    for option, meaning in options.items():
        lines = done.stdout.partition("\noptions:\n")[2].splitlines()
        assert any(re.match(rf"  (-h, )?{option}\b", line) for line in lines), f"{option} is not in the help"
        assert meaning, f"{option} has no help"
