"""What only a GPU can show: its numbers, its copies, its memory. `pytest tests/gpu -s` prints what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import msmil
from launch.cli import main
from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.ahead import on_device
from msmil.engine.bench.images import packed_for
from msmil.engine.bench.ours import OurStep, calibrate, host_batch
from msmil.engine.bench.plain import PlainStep
from msmil.engine.memory import OutOfMemory
from msmil.engine.pipeline import open_pipeline
from msmil.engine.run import open_run
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import open_stream, stepper_of_epoch
from shards.types import Batch
from tests.benchmarks.memory import step_bytes
from tests.distributed.runs import zero
from tests.experiments import write_tiny
from tests.parity.published import golden, published_state
from tests.parity.test_published_models import BOUND, CASES, ours, tiles
from tests.runs import reset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPE = Path(__file__).parents[2] / "configs" / "experiment" / "vindr_mass_fpn_abmil.yaml"
DEVICE = torch.device("cuda", 0)
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    reset()
    yield
    reset()
    torch.cuda.empty_cache()


class Steps(NamedTuple):
    """The first steps of a run: loss, gradient norm before clipping, and whether the update was skipped."""

    loss_S: list[float]
    gradient_norm_S: list[float]
    skipped_S: list[bool]


def first_steps(folder: Path, packed: Path, *, cpu: bool, **train: Any) -> Steps:
    """Train the small experiment for a few steps in this process."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true" if cpu else "false")
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        reset()
        config = load_config(write_tiny(folder, packed, train=train, optim={"warmup_epochs": 0}))
        run = open_run(config, Runtime(config.train, quiet=True))
        stepper, timer = stepper_of_epoch(run, 0), PhaseTimer(run.pipeline.runtime.synchronize)
        stream = open_stream(run, 0)
        reports = [stepper(stream, epoch=0, step=step, timer=timer) for step in range(STEPS)]
        assert run.pipeline.runtime.device.type == ("cpu" if cpu else "cuda")
        assert next(run.network.parameters()).device.type == run.pipeline.runtime.device.type
        assert run.tracker is not None
        run.tracker.close()
        run.folder.close()
    reset()
    return Steps(
        [report.losses["total"] for report in reports],
        [report.gradient_norm for report in reports],
        [report.skipped for report in reports],
    )


@pytest.fixture(scope="module")
def cpu_steps(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Steps:
    """Before any test: DeepSpeed leaves a process group of GPUs behind, in which a CPU cannot train."""
    return first_steps(tmp_path_factory.mktemp("reference") / "cpu", packed, cpu=True, precision="fp32")


@pytest.mark.parametrize("engine", [{}, zero(2), zero(3)], ids=["ddp", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("precision", "loss_bound", "norm_bound"), [("fp32", 1e-5, 1e-4), ("bf16", 1e-3, 1e-2), ("fp16", 1e-3, 1e-2)]
)
def test_a_gpu_trains_as_a_cpu_does(
    precision: str,
    loss_bound: float,
    norm_bound: float,
    engine: dict[str, Any],
    tmp_path: Path,
    packed: Path,
    cpu_steps: Steps,
) -> None:
    """Losses and gradient norms of the first steps, relative. fp16 skips steps until its scale fits."""
    found = first_steps(tmp_path / "gpu", packed, cpu=False, precision=precision, **engine)
    # the loss of a step is computed before its update: those up to the first skipped one see the same weights
    skipped_S = found.skipped_S
    comparable = skipped_S.index(True) if True in skipped_S else STEPS
    of_loss = differences(found.loss_S[: comparable + 1], cpu_steps.loss_S)
    of_norm = differences(found.gradient_norm_S[:comparable], cpu_steps.gradient_norm_S)
    print(f"\n{precision} {engine}: losses {of_loss}, norms {of_norm}, {sum(skipped_S)} skipped", end="")
    assert max(of_loss) <= loss_bound
    assert max(of_norm, default=0) <= norm_bound
    assert all(math.isfinite(loss) for loss in found.loss_S)
    assert not any(skipped_S) or precision == "fp16"


def differences(found: list[float], expected: list[float]) -> list[float]:
    return [float(f"{abs(f / e - 1):.1e}") for f, e in zip(found, expected, strict=False)]


def test_copies_ahead_are_right_under_load() -> None:
    """Batches that are freed at once, while a queue of long products keeps the GPU behind the host."""
    number, shape = 100, (4, 1, 1520, 912)
    image_NB1HW = torch.randint(0, 65535, (3, *shape), dtype=torch.int32).to(torch.uint16)
    busy = torch.randn(4096, 4096, device=DEVICE)

    def batches() -> Iterator[Batch]:
        for i in range(number):
            label_BK = torch.full((4, 1), i % 100, dtype=torch.int8)
            yield Batch(image_NB1HW[i % 3], label_BK, torch.ones(4), torch.arange(4)).pin_memory()

    sums: list[torch.Tensor] = []
    for batch in on_device(batches(), DEVICE):
        assert batch.image_B1HW is not None
        assert batch.image_B1HW.is_cuda
        assert not batch.sample_B.is_cuda, "the host reads it"
        busy = (busy @ busy).clamp(-1, 1)
        sums.append(torch.stack([batch.image_B1HW.to(torch.int64).sum(), batch.label_BK.to(torch.int64).sum()]))
        del batch
    expected = [[int(image_NB1HW[i % 3].to(torch.int64).sum()), 4 * (i % 100)] for i in range(number)]
    assert torch.stack(sums).tolist() == expected


def recipe(*overrides: str) -> Config:
    return load_config(RECIPE, ["model.pretrained=false", "data.workers=0", *overrides])


@pytest.mark.parametrize("overrides", [(), ("train.trainable_blocks=all",)], ids=["last 8 blocks", "all blocks"])
def test_the_peak_is_what_was_computed(overrides: tuple[str, ...]) -> None:
    """The computed table counts tensors; workspaces of libraries come on top. Optimizer and input included."""
    images, size_hw = 4, (1520, 912)
    config = recipe("train.batch_size=4", *overrides)
    (computed,) = step_bytes(config, size_hw, [images])
    with packed_for(config, size_hw, images) as filled:
        pipeline = open_pipeline(filled, Runtime(filled.train, quiet=True))
        before = torch.cuda.memory_allocated(DEVICE)
        step, batch = PlainStep(pipeline), host_batch(pipeline, images)
        calibrate(pipeline, step.network, host_batch(pipeline, 1))
        step([batch])
        torch.cuda.reset_peak_memory_stats(DEVICE)
        step([batch])
        measured = torch.cuda.max_memory_allocated(DEVICE) - before
    print(f"\n{overrides}: computed {computed / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB", end="")
    assert 0.85 * computed <= measured <= 1.6 * computed


@contextmanager
def no_more_memory() -> Iterator[None]:
    """This process may hold what it holds, and no more."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(DEVICE) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_when_memory_runs_out_the_word_names_batch_memory_and_settings() -> None:
    config = recipe("train.batch_size=16", "train.precision=fp32")
    with packed_for(config, (760, 456), 16) as filled:
        pipeline = open_pipeline(filled, Runtime(filled.train, quiet=True))
        step = OurStep(pipeline, host_batch(pipeline, 1))
        step([host_batch(pipeline, 2)])
        with no_more_memory(), pytest.raises(OutOfMemory) as raised:
            step([host_batch(pipeline, 16)])
        print(f"\n{raised.value}", end="")
        assert "out of memory with 16 images at a time" in raised.value.thing
        assert torch.cuda.get_device_name(DEVICE) in raised.value.thing
        for setting in ("train.accumulation", "gradient_checkpointing", "precision: bf16", "trainable_blocks"):
            assert setting in raised.value.fix
        del raised
        step([host_batch(pipeline, 16)])


def test_bench_train(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, packed, train={"precision": "bf16"})
    assert main(["bench", "train", str(config), "--steps", "2", "--find-batch", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["device"] == torch.cuda.get_device_name(DEVICE)
    assert found["largest_batch"]["tried"]
    assert found["largest_batch"]["images"] >= 6
    assert found["compared"][0]["ratio"] == 1


@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_weights_give_the_published_numbers(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, as tests/parity has it on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = msmil.load_published(published_state(name)).to(DEVICE)
    with torch.inference_mode():
        found = ours(network(tiles(case).to(DEVICE)))
    array = golden(name)
    for key in ("logits", "side_logits"):
        if key in found and f"{case}/{key}" in array:
            expected = array[f"{case}/{key}"].reshape(found[key].shape)
            worst = abs(found[key].cpu().numpy() - expected).max()
            print(f"\n{name} {case} {key}: max difference {worst:.1e}", end="")
            assert worst <= BOUND
