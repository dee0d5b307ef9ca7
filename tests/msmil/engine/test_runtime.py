"""accelerate is configured by the experiment alone; what says otherwise is refused with both values."""

from __future__ import annotations

import contextlib
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from msmil.config import TrainConfig
from msmil.engine.environment import refuse_environment, require_engine
from msmil.engine.runtime import Runtime, emulated_precision, meet
from msmil.engine.watchdog import EXIT_HUNG
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


ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}  # what `accelerate launch` makes of a file with a section on DeepSpeed


@pytest.mark.parametrize(
    ("variables", "both"),
    [
        ({}, ()),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("STAGE=3", "train.zero_stage: 2")),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, ("nvme", "train.offload_optimizer: True")),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ("PARAM_DEVICE=cpu", "train.offload_optimizer")),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, ("ds.json", "train.engine: deepspeed")),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, ("CLIPPING=0.5", "optim.clip_grad_norm: 1")),
        ({"ACCELERATE_GRADIENT_CLIPPING": "auto"}, ("CLIPPING=auto", "optim.clip_grad_norm: 1")),
    ],
)
def test_a_section_on_deepspeed_agrees_or_is_refused(variables: dict[str, str], both: tuple[str, ...]) -> None:
    config = TrainConfig(engine="deepspeed", zero_stage=2, offload_optimizer=True)
    if not both:
        refuse_environment(config, ZERO_2, clip_grad_norm=1.0)
        return
    with pytest.raises(UserError) as error:
        refuse_environment(config, ZERO_2 | variables, clip_grad_norm=1.0)
    assert all(value in str(error.value) for value in both)


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_engine(TrainConfig())
    with pytest.raises(UserError, match="deepspeed is not installed"):
        require_engine(TrainConfig(engine="deepspeed"))


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


@pytest.mark.parametrize(("rank", "said"), [(0, "1/2 clients joined"), (1, "timed out")])
def test_processes_that_do_not_meet_say_where_and_end(
    rank: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first of two whose second is not started, and a second whose first is not."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))

    def leave(code: int) -> None:
        raise SystemExit(code)

    def store() -> None:
        dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=1))

    monkeypatch.setattr("msmil.engine.watchdog.os._exit", leave)
    with pytest.raises(SystemExit) as ended:
        meet(store)  # type: ignore[arg-type]
    assert ended.value.code == EXIT_HUNG
    told = capfd.readouterr().err
    assert (
        f"msmil: rank {rank} ({socket.gethostname()}): the 2 processes did not meet at 127.0.0.1, port {port}" in told
    )
    assert said in told


@pytest.mark.parametrize("error", [None, UserError("a", fix="b"), KeyboardInterrupt()])
@pytest.mark.usefixtures("alone_on_a_cpu")
def test_no_thread_asks_the_store_when_python_ends(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ aborts the process where Python takes such a thread away: exit code 134 in place of the one that is meant."""
    runtime, ended = Runtime(TrainConfig(precision="fp32"), quiet=True), []
    monkeypatch.setattr(runtime, "_watchdog", SimpleNamespace(close=lambda: ended.append("watchdog")))
    monkeypatch.setattr(runtime.accelerator, "end_training", lambda: ended.append("ranks"))
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)), runtime:
        if error is not None:
            raise error
    assert ended == (["watchdog", "ranks"] if error is None else ["watchdog"])
