"""DeepSpeed settings that contradict each other, or that it cannot do exactly, are refused before anything starts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from msmil.config_io import config_from_dict
from msmil.engine.environment import without_engine
from msmil.engine.runtime import _build_no_operators, deepspeed_config
from shards.errors import UserError


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"offload_optimizer": True}, "train.offload_optimizer"),
        ({"zero_stage": 3}, "train.zero_stage"),
        ({"engine": "deepspeed", "compile": True}, "train.compile"),
        ({"engine": "deepspeed", "zero_stage": 0, "offload_optimizer": True}, "train.offload_optimizer"),
        ({"engine": "deepspeed", "zero_stage": 3, "ema_decay": 0.9}, "train.ema_decay"),
        ({"engine": "deepspeed", "zero_stage": 4}, "train.zero_stage"),
    ],
)
def test_contradictions_are_refused(train: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config_from_dict({"train": train})


def test_deepspeed_is_told_what_the_experiment_says() -> None:
    words = {"engine": "deepspeed", "zero_stage": 1, "offload_optimizer": True, "accumulation": 2, "precision": "bf16"}
    told = deepspeed_config(config_from_dict({"train": words}).train, micro_batch=3)
    assert told["zero_optimization"]["stage"] == 1
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (3, 2)
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "bf16" not in told, "its own bf16 mode casts parameters and leaves batch-norm buffers behind"


def test_every_release_of_deepspeed_that_may_be_installed_is_told_to_build_no_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ops = SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
    for name, module in (("deepspeed", SimpleNamespace(ops=ops)), ("deepspeed.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)
    _build_no_operators()
    assert not ops.__compatible_ops__.get("deepspeed_shm_comm", False), "as later ones ask"
    assert not ops.__compatible_ops__["deepspeed_shm_comm"], "as those up to 0.19.0 ask"


def test_what_trains_nothing_needs_no_engine() -> None:
    words = {"engine": "deepspeed", "zero_stage": 3, "offload_optimizer": True}
    assert without_engine(config_from_dict({"train": words}).train) == config_from_dict({}).train
