"""A run folder explains itself, and belongs to one configuration."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from msmil.config import Config
from msmil.config_io import config_from_dict, dump_config, load_config
from msmil.engine.checkpoint import Snapshot, load_checkpoint, load_newest, save_checkpoint
from msmil.engine.evaluate import find_checkpoint
from msmil.engine.run_folder import RunFolder, describe_environment
from msmil.engine.tracking import Tracker
from msmil.types import TrainState
from shards.errors import UserError

OTHER = {"optim": {"beta1": 0.5}}


def trained(root: Path, config: Config, *, step: int = 1) -> RunFolder:
    """A folder with a checkpoint of this configuration."""
    folder = RunFolder(root)
    folder.open(world=2, device="CPU")
    folder.write_config(config)
    state = TrainState(
        step=step, epoch=1, batches_done=0, samples_seen=8, best_metric=None, best_step=None, data_fingerprint=""
    )
    content = Snapshot(
        model={"w": torch.ones(1)},
        optimizer={},
        ema=None,
        state=state,
        loss_scale=None,
        config_yaml=dump_config(config),
    )
    save_checkpoint(folder.checkpoints, content)
    folder.close()
    return folder


def test_it_holds_the_configuration_and_the_environment_of_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    monkeypatch.setenv("MSMIL_COMMAND", "msmil train a.yaml")
    for _ in range(2):
        folder.open(world=2, device="CPU")
        folder.write_config(Config(name="a"))
        folder.close()
    assert load_config(folder.config) == Config(name="a")
    text = folder.environment.read_text()
    assert text.count("started:") == text.count("command: msmil train a.yaml") == text.count("ranks: 2 on CPU") == 2
    assert all(word in text for word in ("torch:", "commit:", "python:"))


def test_a_machine_without_git_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit: unknown (no git)" in describe_environment(1, "CPU")


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    folder = trained(tmp_path, Config())
    folder.config.unlink()  # the checkpoint's own copy decides
    with pytest.raises(UserError) as error:
        folder.check(config_from_dict({"optim": {"beta1": 0.5}, "model": {"fpn_dim": 8}}))
    assert "optim.beta1 is 0.9 there and 0.5 now" in str(error.value)
    assert "model.fpn_dim is 256 there and 8 now" in str(error.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"workers": 7}},
        {"tracking": {"every_steps": 1}},
        {"data": {"shards": "elsewhere"}},
        {"optim": {"lr": 0.5}},
        {"train": {"engine": "deepspeed", "zero_stage": 3, "accumulation": 2}},
    ],
)
def test_the_learning_rate_how_steps_are_computed_and_what_moves_no_weight_may_change(
    tmp_path: Path, tree: dict[str, object]
) -> None:
    trained(tmp_path, Config()).check(config_from_dict(tree))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("last_batch", "wrap"), ("sampling", "class_balanced"), ("group_by", "exam"), ("fraction", 0.5),
        ("fraction_seed", 1), ("shuffle_block_shards", 2),
    ],
)  # fmt: skip
def test_nothing_that_changes_the_order_may_change(tmp_path: Path, key: str, value: object) -> None:
    before = {"fraction": 0.75} if key == "fraction_seed" else {}
    folder = trained(tmp_path, config_from_dict({"data": before}))
    with pytest.raises(UserError, match=f"data.{key} is .* there and {value!r} now"):
        folder.check(config_from_dict({"data": before | {key: value}}))


def test_where_no_checkpoint_is_whole_nothing_begins_again(tmp_path: Path) -> None:
    folder = trained(tmp_path, Config())
    (folder.checkpoints / "step_00000001" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole \(step_00000001: model\.safetensors is missing\)"):
        folder.check(Config())


def zeroed(file: Path) -> None:
    """What a disk leaves that lost power before it had written: the size is right."""
    file.write_bytes(bytes(file.stat().st_size))


def test_a_checkpoint_whose_configuration_is_not_what_was_saved_binds_nobody(tmp_path: Path) -> None:
    """The start goes on from the one before it, and so that one's configuration is compared."""
    trained(tmp_path, Config())
    folder = trained(tmp_path, config_from_dict(OTHER), step=2)
    with pytest.raises(UserError, match=r"optim\.beta1 is 0\.5 there and 0\.9 now"):
        folder.check(Config())
    zeroed(folder.checkpoints / "step_00000002" / "config.yaml")
    folder.check(Config())
    with pytest.raises(UserError, match=r"optim\.beta1 is 0\.9 there and 0\.5 now"):
        folder.check(config_from_dict(OTHER))
    zeroed(folder.checkpoints / "step_00000001" / "config.yaml")
    thing = r"no checkpoint is whole \(step_00000002: config\.yaml has other content than was saved\)"
    with pytest.raises(UserError, match=thing):
        folder.check(Config())


def test_a_checkpoint_that_was_being_saved_again_when_its_process_was_killed_is_there(tmp_path: Path) -> None:
    """It was killed between the two renames, as in tests/shards/test_files.py."""
    folder = trained(tmp_path, Config())
    whole, away = (folder.checkpoints / name for name in ("step_00000001", ".step_00000001.123.old"))
    for look in (
        lambda: folder.check(config_from_dict(OTHER)),
        lambda: find_checkpoint(folder, "latest", other_data=False),
        lambda: load_newest(folder.checkpoints, print),
    ):
        whole.rename(away)
        with contextlib.suppress(UserError):  # another configuration: the checkpoint tells it
            look()
        assert load_checkpoint(whole).state.step == 1
        assert not away.exists()


def test_nothing_is_mended_while_another_process_trains(tmp_path: Path) -> None:
    folder = trained(tmp_path, Config())
    whole, away = (folder.checkpoints / name for name in ("step_00000001", ".step_00000001.123.old"))
    whole.rename(away)
    folder.open(world=1, device="CPU")
    RunFolder(tmp_path).mend()
    assert away.exists()
    folder.close()


def started(root: Path, config: Config) -> tuple[RunFolder, Tracker]:
    """A folder whose run has begun, and has trained nothing yet."""
    folder = RunFolder(root)
    folder.open(world=1, device="CPU")
    folder.write_config(config)
    tracker = Tracker(folder.tensorboard, start_step=0, total_steps=9, failed=pytest.fail)
    tracker.text("configuration", dump_config(config))
    return folder, tracker


def test_a_start_that_failed_before_it_trained_binds_nobody(tmp_path: Path) -> None:
    folder, tracker = started(tmp_path, Config())
    tracker.close()
    folder.check(config_from_dict(OTHER))


def test_steps_that_are_recorded_bind_before_the_first_checkpoint_too(tmp_path: Path) -> None:
    """The log and TensorBoard would show both configurations as one run."""
    folder, tracker = started(tmp_path, Config())
    tracker.scalars({"train/loss/total": 1.0}, 1)
    tracker.close()
    with pytest.raises(UserError, match=r"another configuration: optim\.beta1 is 0\.9 there and 0\.5 now") as error:
        folder.check(config_from_dict(OTHER))
    assert error.value.file == str(tmp_path)
    assert "choose another name" in error.value.fix
    assert "remove" not in error.value.fix, "it is in training"
    folder.close()
    with pytest.raises(UserError, match="or remove this folder"):
        folder.check(config_from_dict(OTHER))
    folder.check(config_from_dict({"optim": {"lr": 0.5}, "data": {"workers": 7}}))


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.open(world=1, device="CPU")
    with pytest.raises(UserError, match="another process trains"):
        RunFolder(tmp_path).open(world=1, device="CPU")
    first.close()
    RunFolder(tmp_path).open(world=1, device="CPU")


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        RunFolder(tmp_path / "file" / "run").check(Config())
