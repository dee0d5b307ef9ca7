"""A checkpoint is whole or absent; what was there survives a failed save."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msmil.engine.checkpoint import (
    DamagedError,
    Snapshot,
    host_copy,
    load_checkpoint,
    load_newest,
    point,
    prune,
    save_checkpoint,
)
from msmil.engine.checkpoint_state import newest, pointed
from msmil.types import TrainState
from shards.errors import UserError


def state(step: int) -> TrainState:
    return TrainState(
        step=step, epoch=1, batches_done=2, samples_seen=8 * step, best_metric=0.5, best_step=1, data_fingerprint="f"
    )


def save(root: Path, step: int, size: int = 4, *, ema: bool = False, **told: Any) -> Path:
    model = {"w": torch.full((size,), float(step))}
    snapshot = Snapshot(
        model=model,
        optimizer={"w/exp_avg": torch.ones(size)},
        ema={"module.w": model["w"] + 1} if ema else None,
        state=replace(state(step), **told),
        loss_scale=None,
        config_yaml="name: x\n",
    )
    return save_checkpoint(root, snapshot)


def as_the_first_release(folder: Path) -> None:
    """Without the sizes of its files, and without the metric of its own step."""
    file = folder / "state.json"
    content = json.loads(file.read_text())
    del content["files"], content["train_state"]["metric"]
    file.write_text(json.dumps(content))


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


def steps(root: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step_")) for folder in root.glob("step_*"))


def test_pruning_keeps_the_newest_and_what_is_pointed_at(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    point(tmp_path, "best", "step_00000001")
    prune(tmp_path, keep_last=2, keep_best=1)
    assert steps(tmp_path) == [1, 5, 6]


def test_pruning_keeps_the_best_by_the_metric_that_each_one_tells(tmp_path: Path) -> None:
    metrics = {1: 0.6, 2: 0.9, 3: None, 4: 0.7, 5: 0.7, 6: 0.5, 7: None}
    for step, metric in metrics.items():
        save(tmp_path, step, metric=metric, best_metric=0.9, best_step=2)
    prune(tmp_path, keep_last=1, keep_best=2)
    assert steps(tmp_path) == [2, 4, 7], "of equal ones the first"
    assert pointed(tmp_path, "best") == tmp_path / "step_00000002"


def test_a_checkpoint_of_the_first_release_tells_its_metric_where_it_was_the_best(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        as_the_first_release(save(tmp_path, step, best_step=best, best_metric=0.1 * best))
    save(tmp_path, 4, best_step=2, metric=0.15)
    prune(tmp_path, keep_last=1, keep_best=2)
    assert steps(tmp_path) == [2, 4]
    assert load_checkpoint(tmp_path / "step_00000002").state.metric is None


def test_best_is_the_best_of_the_run_as_it_is_now(tmp_path: Path) -> None:
    """After going on from an older checkpoint, what came behind it is no part of the run any more."""
    save(tmp_path, 1, best_step=1, metric=0.5)
    os.truncate(save(tmp_path, 2, best_step=2, best_metric=0.9, metric=0.9) / "model.safetensors", 9)
    assert pointed(tmp_path, "best") == tmp_path / "step_00000002"
    save(tmp_path, 3, best_step=1, metric=0.4)
    assert pointed(tmp_path, "best") == tmp_path / "step_00000001"


def test_a_save_that_was_cut_off_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".step_00000002.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == tmp_path / "step_00000001"
    save(tmp_path, 2)
    assert not leftover.exists()


FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "config.yaml", "state.json")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zeros(file: Path) -> None:
    """What a disk without fsync leaves: the size is right."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, Path.unlink, zeros])
@pytest.mark.parametrize("name", FILES)
def test_what_was_cut_off_is_left_out_with_a_word_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    before, folder = save(tmp_path, 1, ema=True), save(tmp_path, 2, ema=True)
    damage(folder / name)
    said: list[str] = []
    loaded = load_newest(tmp_path, said.append)
    assert loaded is not None
    assert loaded.folder == before
    assert len(said) == 1
    assert str(folder) in said[0]
    assert name in said[0]
    with pytest.raises(DamagedError, match=rf"step_00000002.*{name}"):
        load_checkpoint(folder)
    if damage is not zeros or name == "state.json":
        assert newest(tmp_path) == before, "sizes tell it without reading the tensors"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.yaml", "state.json"])
def test_one_of_the_first_release_is_left_out_too(tmp_path: Path, name: str) -> None:
    before, folder = save(tmp_path, 1), save(tmp_path, 2)
    for one in (before, folder):
        as_the_first_release(one)
    assert load_checkpoint(folder).state == state(2)
    (folder / name).unlink()
    loaded = load_newest(tmp_path, lambda _: None)
    assert loaded is not None
    assert loaded.folder == before


def test_where_none_is_whole_nothing_begins_again(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nothing", lambda _: None) is None
    for step in (1, 2):
        truncate(save(tmp_path, step) / "model.safetensors")
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match=r"no checkpoint is whole .*model\.safetensors has \d+ of \d+ bytes"):
        load_newest(tmp_path, lambda _: None)


def test_what_was_cut_off_goes_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        save(tmp_path, step, best_step=None)
    for step in (2, 4):
        truncate(tmp_path / f"step_{step:08d}" / "model.safetensors")
    save(tmp_path, 3, best_step=None)
    prune(tmp_path, keep_last=2, keep_best=1)
    assert steps(tmp_path) == [1, 3, 4], "the broken one ahead is no hindrance: its step comes again"
    assert pointed(tmp_path, "latest") == newest(tmp_path) == tmp_path / "step_00000003"


def test_a_host_copy_does_not_change_with_what_it_was_made_of() -> None:
    weight = torch.rand(3, 4, 5, 6).to(memory_format=torch.channels_last)
    copy = host_copy({"w": weight})["w"]
    assert copy.is_contiguous()
    assert torch.equal(copy, weight)
    weight.zero_()
    assert copy.any()


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
        monkeypatch.setattr("shards.files.free_bytes", lambda _: 10**12)
    needed = r"3\.5 MB are needed.*resumes"
    with pytest.raises(UserError, match=needed):
        save(small_disk, 2, size=400_000)
    assert [p.name for p in small_disk.glob("*step_*")] == [before.name]
    assert load_checkpoint(before).state.step == 1
