"""accelerate is configured by the experiment alone; what says otherwise is refused with both values."""

from __future__ import annotations

import pytest
import torch

from msmil.config import TrainConfig
from msmil.engine.environment import refuse_environment
from msmil.engine.runtime import Runtime, emulated_precision
from shards.errors import UserError


@pytest.mark.parametrize(
    ("variables", "both"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ("fp16", "train.precision: bf16")),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ("ACCELERATE_USE_DEEPSPEED=true", "train.engine: ddp")),
        ({"ACCELERATE_USE_FSDP": "true"}, ("ACCELERATE_USE_FSDP=true", "train.engine: ddp")),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ("STEPS=4", "train.accumulation: 2")),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ("INDUCTOR", "train.compile: False")),
    ],
)
def test_a_contradiction_is_refused_with_both_values(variables: dict[str, str], both: tuple[str, str]) -> None:
    with pytest.raises(UserError) as error:
        refuse_environment(TrainConfig(precision="bf16", accumulation=2), variables)
    assert all(value in str(error.value) for value in both)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
    ],
)
def test_what_agrees_or_says_nothing_passes(variables: dict[str, str]) -> None:
    refuse_environment(TrainConfig(precision="bf16", accumulation=2), variables)


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"batch_norm": "sync"}])
def test_what_needs_a_gpu_is_refused_on_a_cpu(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="no GPU"):
        Runtime(TrainConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_on_a_cpu_without_instructions_for_it_is_told(
    precision: str, device: str, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msmil.engine.runtime.cpu_has_bf16", lambda: instructions)
    told = emulated_precision(TrainConfig(precision=precision), torch.device(device))  # type: ignore[arg-type]
    assert (told is not None) == (precision == "bf16" and device == "cpu" and not instructions)
    assert told is None or "speed is that of train.precision=fp32" in told
