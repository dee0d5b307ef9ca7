"""A checkpoint is whole or absent; what was there survives a failed save."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from msmil.engine.checkpoint import load_checkpoint, point, prune, save_checkpoint
from msmil.engine.checkpoint_state import newest, pointed
from msmil.types import TrainState
from shards.errors import UserError


def state(step: int) -> TrainState:
    return TrainState(
        step=step, epoch=1, batches_done=2, samples_seen=8 * step, best_metric=0.5, best_step=1, data_fingerprint="f"
    )


def save(root: Path, step: int, size: int = 4, *, ema: bool = False) -> Path:
    model = {"w": torch.full((size,), float(step))}
    return save_checkpoint(
        root,
        model=model,
        optimizer={"w/exp_avg": torch.ones(size)},
        ema={"module.w": model["w"] + 1} if ema else None,
        state=state(step),
        loss_scale=None,
        config_yaml="name: x\n",
    )


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, ema: bool) -> None:
    loaded = load_checkpoint(save(tmp_path, 7, ema=ema))
    assert loaded.state == state(7)
    assert loaded.model["w"].tolist() == [7.0] * 4
    assert loaded.optimizer["w/exp_avg"].tolist() == [1.0] * 4
    assert (loaded.ema is not None) == ema
    assert loaded.config_yaml == "name: x\n"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, size=4)
    assert len(load_checkpoint(save(tmp_path, 3, size=5)).model["w"]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_pointers_and_the_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert pointed(tmp_path, "latest") is None
    for step in (2, 10):
        save(tmp_path, step)
    point(tmp_path, "best", "step_00000002")
    assert pointed(tmp_path, "best") == tmp_path / "step_00000002"
    assert newest(tmp_path) == pointed(tmp_path, "latest") == tmp_path / "step_00000010"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    point(tmp_path, "best", "step_00000001")
    prune(tmp_path, 2)
    assert sorted(p.name[-1] for p in tmp_path.glob("step_*")) == ["1", "5", "6"]


def test_a_save_that_was_cut_off_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".step_00000002.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == tmp_path / "step_00000001"
    save(tmp_path, 2)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    file = folder / name
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="step_00000001"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{}", b'{"format_version": 1}'])
def test_a_corrupt_state_is_named(tmp_path: Path, content: bytes) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_bytes(content)
    with pytest.raises(UserError, match="step_00000001"):
        load_checkpoint(folder)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    file = folder / "state.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="99"):
        load_checkpoint(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("needs root to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("checked_first", [True, False])
def test_a_full_disk_keeps_the_checkpoint_before(
    small_disk: Path, checked_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(small_disk, 1)
    if not checked_first:  # the disk fills up after the check
        monkeypatch.setattr("msmil.engine.checkpoint._check_free_space", lambda *_: None)
    with pytest.raises(UserError, match="resumes"):
        save(small_disk, 2, size=400_000)
    assert [p.name for p in small_disk.glob("*step_*")] == [before.name]
    assert load_checkpoint(before).state.step == 1
