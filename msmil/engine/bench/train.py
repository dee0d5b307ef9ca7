"""`msmil bench train`: what a training step costs, where the time goes, and how it compares to the published way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from msmil.config import Config
from msmil.engine.bench.arithmetic import DTYPES, count_flops, matmul_flops_per_s
from msmil.engine.bench.clock import clock_name, in_turn, peak_of
from msmil.engine.bench.images import packed_for
from msmil.engine.bench.largest import largest_batch
from msmil.engine.bench.ours import OurStep, calibrate, endless, host_batch
from msmil.engine.bench.plain import (
    Mode,
    PlainStep,
    in_mode,
    in_tiles,
    modes,
    pipeline_of,
    pixels_per_image,
    published_way,
)
from msmil.engine.memory import resident_bytes
from msmil.engine.pipeline import Pipeline, open_pipeline
from msmil.engine.runtime import Runtime, gpu_in_use
from shards.errors import UserError
from shards.files import human_bytes
from shards.host_memory import keep_freed_memory, return_freed_memory
from shards.tables import aligned

Say = Callable[[str], None]
_MOST_IMAGES: Final = 1024
_WARM_STEPS: Final = 3  # in which a GPU chooses its algorithms
_PUBLISHED: Final = "published way: fp32, contiguous, eager, 3 channels, tiles of 512"
_PUBLISHED_KEPT: Final = "published way, freed memory kept (see shards/host_memory.py)"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    device: cpu or cuda, None: a GPU where there is one; size_hw: of drawn images, None: those of data.shards; steps:
    of a loop, and rounds of a comparison, None: as many as the device does in a minute or two; find_batch: also look
    for the largest batch; modes: also compare modes, see `plain.modes`.
    """

    device: str | None = None
    size_hw: tuple[int, int] | None = None
    steps: int | None = None
    find_batch: bool = False
    modes: str | None = None


def bench_train(config: Config, options: Options, say: Say) -> dict[str, Any]:
    """Measure, `say` each part as it is known, and return everything by name.

    Raises:
        UserError: the configuration, the data or the device do not allow it.
    """
    if config.data.features and options.size_hw is None:
        fix = "set data.features: '' (with stored features there is no published way to compare with)"
        raise UserError("data.features is set, but a step from images is measured", fix=fix)
    _choose_device(options.device)
    runtime = Runtime(config.train, quiet=True)
    steps = options.steps or (20 if runtime.device.type == "cuda" else 3)
    size = config.train.batch_size
    # one epoch lasts for all loops, in which starting another one would be waited for
    images = max(size, min((2 * steps + _WARM_STEPS + 1) * size, _MOST_IMAGES))
    with packed_for(config, options.size_hw, images) as filled:
        return _Bench(open_pipeline(filled, runtime), replace(options, steps=steps), say).run()


def _choose_device(device: str | None) -> None:
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if device == "cuda" and not gpu_in_use():
        fix = "leave --device out, or make a GPU visible (`msmil doctor`, ACCELERATE_USE_CPU)"
        raise UserError("--device cuda, but there is no GPU in use", fix=fix)


class _Bench:
    """One run of the benchmark."""

    def __init__(self, pipeline: Pipeline, options: Options, say: Say) -> None:
        self.pipeline, self.options, self.say = pipeline, options, say
        self.config, self.device = pipeline.config, pipeline.runtime.device
        assert options.steps is not None
        self.steps = options.steps
        micro = self.config.train.batch_size // self.config.train.accumulation
        self.batches = [host_batch(pipeline, micro)] * self.config.train.accumulation
        self.found: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """All parts, in order."""
        ours = OurStep(self.pipeline, host_batch(self.pipeline, 1))
        self._head(ours)
        self._split(ours)
        published = self._plain(published_way(self.config))
        self._compare(ours, published)
        if self.options.modes is not None:
            self._modes(published, modes(self.options.modes))
        if self.options.find_batch:
            self._largest(ours)
        return self.found

    def _head(self, ours: OurStep) -> None:
        config, (height, width) = self.config, self.pipeline.image_hw
        drawn = "" if self.options.size_hw is None else " (drawn)"
        train = config.train
        self.found |= {
            "name": config.name,
            "image_hw": [height, width],
            "batch_size": train.batch_size,
            "trainable_blocks": ours.blocks,
            "device": self.pipeline.runtime.device_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        parts = f" in {train.accumulation} parts" if train.accumulation > 1 else ""
        self.say(
            f"{config.name}: images of {height} x {width} pixels{drawn}, batch {train.batch_size}{parts}, "
            f"{ours.blocks} of the backbone's blocks train, {mode_of(config)}"
        )
        threads = "" if self.device.type == "cuda" else f", {torch.get_num_threads()} threads"
        self.say(f"{self.pipeline.runtime.device_name}{threads}, torch {torch.__version__}")

    def _split(self, ours: OurStep) -> None:
        """Phases, speed, arithmetic, memory of the loop as it trains."""
        stream = endless(self.pipeline)
        ours.phases(stream, 1 if self.device.type == "cpu" else _WARM_STEPS)
        peak = peak_of(lambda: ours.phases(stream, 1), self.device)
        phases = ours.phases(stream, self.steps)
        loop = ours.loop(stream, self.steps)
        speed = 1 / loop.wall
        flops = self._flops_per_image()
        rate = _matmul(self.config.train.precision, self.device)
        share = flops / loop.work / rate
        self.found |= {
            "seconds": phases,
            "images_per_s": speed,
            "flop_per_image": flops,
            "flop_per_s": flops / loop.work,
            "matmul_flop_per_s": rate,
            "share_of_matmul": share,
            "peak_bytes": peak,
        }
        whole = phases["step"]
        rows = [["", *phases], ["seconds", *(f"{s:.3f}" for s in phases.values())]]
        rows.append(["share", *(f"{s / whole:.0%}" for s in phases.values())])
        self.say("\nOne step (wall time; medians of the phases, so that they need not add up)")
        self._table(rows)
        self.say(
            f"speed: {speed:.2f} images/s\n"
            f"arithmetic: {flops / 1e9:.0f} GFLOP per image, {flops / loop.work / 1e12:.3f} TFLOP per second of "
            f"{clock_name(self.device)}: {share:.0%} of a matrix product's {rate / 1e12:.3f} in {self._precision()}\n"
            f"peak memory: {human_bytes(peak)}{'' if self.device.type == 'cuda' else ', all of the process'}"
        )

    def _flops_per_image(self) -> int:
        eager = replace(self.config, train=replace(self.config.train, compile=False))
        step, one = self._plain(eager), host_batch(self.pipeline, 1)
        return count_flops(lambda: step.loss(one).backward())

    def _compare(self, ours: OurStep, published: PlainStep) -> None:
        """Ours beside the published way."""
        actions: dict[str, Callable[[], None]] = {
            _PUBLISHED: lambda: published(self.batches),
            f"this configuration: {_words(self.config)}": lambda: ours(self.batches),
        }
        if self.config.bags.instances == "image":
            tiled = self._plain(in_tiles(self.config))
            actions["the same on separate tiles of 512"] = lambda: tiled(self.batches)
        if self.device.type == "cpu":
            actions[_PUBLISHED_KEPT] = lambda: published(self.batches)
        for action in actions.values():
            action()
        rows = self._timed(actions)
        self.found["compared"] = rows
        self.found["pixels_per_image"] = {
            "published": pixels_per_image(published.pipeline, self.batches[0]),
            "ours": pixels_per_image(self.pipeline, self.batches[0]),
        }
        pixels = self.found["pixels_per_image"]
        self.say(
            f"\nA step per image beside the published way of doing it ({clock_name(self.device)}, medians of "
            f"{self.steps} rounds in turn; pixels per image: published {pixels['published']}, ours {pixels['ours']})"
        )
        self._ratios(rows)

    def _modes(self, published: PlainStep, chosen: Sequence[Mode]) -> None:
        """Precision, memory format and compilation, each beside the published way in rounds of its own."""
        self.say(f"\nModes of this configuration, each beside the published way in {self.steps} rounds of its own")
        self.say(f"{'':32} {'seconds':>9} {'published / it':>15} {'peak memory':>12}")
        self.found["modes"] = []
        for mode in chosen:
            try:
                row = self._mode(mode, published)
            except (RuntimeError, UserError) as error:  # no compiler, no kernel, no memory: the others still count
                row = {"name": str(mode), "failed": str(error).splitlines()[0]}
                self.say(f"{mode!s:32} failed: {row['failed']}")
            else:
                peak = human_bytes(row["peak_bytes"])
                self.say(f"{mode!s:32} {row['work_s']:9.4f} {row['ratio']:15.2f} {peak:>12}")
            self.found["modes"].append(row)

    def _mode(self, mode: Mode, published: PlainStep) -> dict[str, Any]:
        before = _in_use(self.device)
        step = self._plain(in_mode(self.config, mode))
        step(self.batches)
        step(self.batches)
        peak = peak_of(lambda: step(self.batches), self.device) - before
        rows = self._timed({_PUBLISHED: lambda: published(self.batches), str(mode): lambda: step(self.batches)})
        return rows[1] | {"peak_bytes": max(0, peak)}

    def _largest(self, ours: OurStep) -> None:
        parts, different = self.config.train.accumulation, len(self.batches[0].sample_B)

        def step(images: int) -> None:
            ours([host_batch(self.pipeline, images, different=different)] * parts)

        self.say("\nLooking for the largest batch")
        found = largest_batch(step, self.device, tell=self.say)
        self.found["largest_batch"] = asdict(found)
        if found.per_image_bytes is not None:
            how = f"not tried: measured {human_bytes(found.per_image_bytes)} per image, in the memory that is available"
        else:
            why = "" if found.failed is None else f": {found.failed}"
            how = f"tried; {found.images + found.grain} do not fit{why}" if found.grain else "tried; more were not"
        self.say(f"Largest batch of one rank and micro-step: {found.images} images ({how})")

    def _plain(self, config: Config) -> PlainStep:
        pipeline = pipeline_of(self.pipeline, config)
        step = PlainStep(pipeline)
        calibrate(pipeline, step.network, host_batch(pipeline, 1))
        return step

    def _timed(self, actions: dict[str, Callable[[], None]]) -> list[dict[str, Any]]:
        """Seconds per image of each action, and how many times faster than the first it is."""
        images = self.config.train.batch_size
        times = in_turn(dict(actions), self.steps, self.device, before=self._memory_for)
        first = next(iter(times.values())).work
        return [
            {"name": name, "work_s": t.work / images, "wall_s": t.wall / images, "ratio": first / t.work}
            for name, t in times.items()
        ]

    def _memory_for(self, name: str) -> None:
        """On a CPU the published way gives freed memory back, as it does when nobody sets anything."""
        if self.device.type == "cpu":
            (return_freed_memory if name == _PUBLISHED else keep_freed_memory)()

    def _ratios(self, rows: Sequence[dict[str, Any]]) -> None:
        head = ["", "seconds", "wall", "published / it"]
        body = [[row["name"], f"{row['work_s']:.4f}", f"{row['wall_s']:.4f}", f"{row['ratio']:.2f}"] for row in rows]
        self._table([head, *body])

    def _table(self, rows: Sequence[Sequence[str]]) -> None:
        for line in aligned(rows):
            self.say(line)

    def _precision(self) -> str:
        precision = self.config.train.precision
        return "TF32, which convolutions use" if _tf32(precision, self.device) else precision


def mode_of(config: Config) -> Mode:
    """The mode that a configuration asks for."""
    channels_last = config.train.channels_last and config.train.engine == "ddp"  # DeepSpeed's buffers are contiguous
    return Mode(config.train.precision, channels_last=channels_last, compiled=config.train.compile)


def _words(config: Config) -> str:
    return f"{mode_of(config)}, {config.model.in_channels} channel(s), {config.bags.instances}"


def _matmul(precision: str, device: torch.device) -> float:
    before = torch.get_float32_matmul_precision()
    if _tf32(precision, device):
        torch.set_float32_matmul_precision("high")
    try:
        return matmul_flops_per_s(DTYPES[precision], device)
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32(precision: str, device: torch.device) -> bool:
    return precision == "fp32" and device.type == "cuda" and bool(torch.backends.cudnn.allow_tf32)


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
