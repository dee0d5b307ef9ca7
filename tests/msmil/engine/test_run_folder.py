"""A run folder explains itself, and belongs to one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from msmil.config import Config
from msmil.config_io import config_from_dict, load_config
from msmil.engine.run_folder import RunFolder
from shards.errors import UserError


def test_opening_writes_configuration_and_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    for _ in range(2):
        folder.open(Config(name="a"))
    assert load_config(folder.config) == Config(name="a")
    text = folder.environment.read_text()
    assert text.count("started:") == 2
    assert all(word in text for word in ("torch:", "commit:", "command:", "python:"))


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(Config())
    with pytest.raises(UserError) as error:
        folder.check(config_from_dict({"optim": {"lr": 0.5}, "model": {"fpn_dim": 8}}))
    assert "optim.lr is 5e-05 there and 0.5 now" in str(error.value)
    assert "model.fpn_dim is 256 there and 8 now" in str(error.value)


@pytest.mark.parametrize(
    "tree", [{"data": {"workers": 7}}, {"tracking": {"every_steps": 1}}, {"data": {"shards": "elsewhere"}}, {}]
)
def test_what_moves_no_weight_may_change(tmp_path: Path, tree: dict[str, object]) -> None:
    folder = RunFolder(tmp_path)
    folder.open(Config())
    folder.check(config_from_dict(tree))


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir"):
        RunFolder(tmp_path / "file" / "run").check(Config())
