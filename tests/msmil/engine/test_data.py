"""The data set of a configuration: its share of the patients, its epoch, and what the log says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.data import describe_epoch, first_epoch, open_data
from shards.errors import UserError
from tests.archives import LABELS
from tests.experiments import write_tiny


def configuration(folder: Path, packed: Path, **data: Any) -> Config:
    return load_config(write_tiny(folder, packed, data=data, train={"batch_size": 18}))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "an epoch: 4 steps, 60 images and 12 places of weight 0"),
        ({"last_batch": "drop"}, "an epoch: 3 steps, 54 images"),
        ({"last_batch": "wrap"}, "an epoch: 4 steps, 72 images"),
        ({"group_by": "exam"}, "an epoch: 4 steps, 60 images and 12 places of weight 0"),
    ],
)
def test_the_log_says_what_an_epoch_is(tmp_path: Path, packed: Path, data: dict[str, Any], said: str) -> None:
    config = configuration(tmp_path, packed, **data)
    assert describe_epoch(first_epoch(config, open_data(config)), LABELS) == said


def test_the_log_says_what_is_drawn_in_turn(tmp_path: Path, packed: Path) -> None:
    config = configuration(tmp_path, packed, sampling="class_balanced", last_batch="drop")
    manifest = open_data(config)
    label_NK = manifest.label_NK(LABELS, manifest.rows("train"))
    mass, calcification = (label_NK == 1).sum(axis=0)
    assert describe_epoch(first_epoch(config, manifest), LABELS) == (
        f"an epoch: 3 steps, 54 images; drawn in turn: Mass ({mass} images), "
        f"Suspicious_Calcification ({calcification} images), none of these ({(label_NK == 0).all(axis=1).sum()} images)"
    )


def test_a_share_of_the_patients_shortens_the_epoch(tmp_path: Path, packed: Path) -> None:
    whole = open_data(configuration(tmp_path, packed))
    config = configuration(tmp_path, packed, fraction=0.6)
    part = open_data(config)
    assert 18 <= len(part.rows("train")) < len(whole.rows("train"))
    assert part.fingerprint != whole.fingerprint
    assert int(first_epoch(config, part).filled_G.sum()) == len(part.rows("train"))


def test_a_share_without_a_patient_is_refused(tmp_path: Path, packed: Path) -> None:
    config = configuration(tmp_path, packed, fraction=0.001)
    with pytest.raises(UserError, match=r"data.fraction of 0.001 takes none of the 15 training patients.*Fix"):
        open_data(config)


@pytest.mark.parametrize("last_batch", ["drop", "wrap"])
def test_statistics_may_move_where_no_place_is_padded(tmp_path: Path, packed: Path, last_batch: str) -> None:
    file = write_tiny(tmp_path, packed, data={"last_batch": last_batch}, train={"batch_norm": "train"})
    config = load_config(file)
    assert (first_epoch(config, open_data(config)).filled_G == config.train.batch_size).all()
