"""The same batch per rank on any number of ranks: speed, bytes sent, seconds of that."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from msmil.config import Config, OptimConfig
from msmil.engine.bench.collectives import Call, as_traffic, counted, seconds_alone
from msmil.engine.bench.projection import Engine, Parameters, Reading, Step, Traffic, sent_bytes
from msmil.engine.optim import build_ema, build_optimizer
from msmil.engine.pipeline import Pipeline, build_network, open_pipeline, with_encoder_of
from msmil.engine.preemption import StopRequest
from msmil.engine.run import make_loss, make_network, make_schedule
from msmil.engine.runtime import Runtime
from msmil.engine.saving import Saver
from msmil.engine.step import Stepper
from msmil.engine.tracking import PhaseTimer
from msmil.engine.train import blocks_of_epoch
from msmil.models.backbone import set_trainable
from msmil.models.mil import MILModel
from shards.errors import UserError
from shards.manifest import Manifest
from shards.reader import ShardReader
from shards.stream import train_stream
from shards.types import Batch

_WARM_UP_STEPS = 2
_DECODED, _DECODE_ROUNDS = 16, 3
_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole on every rank


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What some ranks did, the same on all of them.

    images_per_s: of all ranks together.
    step_s: mean seconds of a step, of the slowest rank.
    backward_s: of it, the backward of the step's last micro-step on rank 0.
    collectives: of one step.
    alone_s: seconds of these collectives with nothing beside them.
    """

    ranks: int
    device: str
    threads: int
    images_per_rank: int
    steps: int
    images_per_s: float
    step_s: float
    backward_s: float
    collectives: tuple[Traffic, ...]
    alone_s: float

    @property
    def sent_bytes(self) -> float:
        """What a rank sends in a step, by rings."""
        return sum(sent_bytes(part.kind, part.payload_bytes, self.ranks) for part in self.collectives)

    def as_step(self) -> Step:
        """For projections; of one rank."""
        assert self.ranks == 1
        return Step(images=self.images_per_rank, seconds=self.step_s, backward_s=self.backward_s)


def measured_from_json(text: str) -> Measured:
    """The inverse of `json.dumps(dataclasses.asdict(measured))`."""
    tree = json.loads(text)
    return Measured(**tree | {"collectives": tuple(Traffic(**part) for part in tree["collectives"])})


def images_of_a_rank(config: Config, ranks: int) -> int:
    """Images per rank and micro-step of an experiment on so many ranks.

    Raises:
        UserError: the batch cannot be divided.
    """
    parts = ranks * config.train.accumulation
    if config.train.batch_size % parts:
        fix = f"say --images N, or set train.batch_size to a multiple of {parts}"
        raise UserError(f"train.batch_size {config.train.batch_size} is not divided by {ranks} ranks", fix=fix)
    return config.train.batch_size // parts


def measure(config: Config, runtime: Runtime, *, steps: int) -> Measured:
    """Train `steps` steps on one batch that is held in memory. No run folder is touched.

    Raises:
        UserError: the configuration or the data do not allow it.
    """
    pipeline = open_pipeline(config, runtime)
    stepper = make_stepper(pipeline)
    pipeline = stepper.pipeline
    batches = one_batch_again_and_again(pipeline)
    for step in range(_WARM_UP_STEPS):
        stepper(batches, epoch=0, step=step, timer=PhaseTimer(runtime.synchronize))
    runtime.barrier()
    start_s = time.perf_counter()
    for step in range(steps):
        stepper(batches, epoch=0, step=step, timer=PhaseTimer(runtime.synchronize))
    runtime.synchronize()
    step_s = max(runtime.gather((time.perf_counter() - start_s) / steps))
    backward_s = backward_seconds(stepper, batches, config.train.accumulation)
    calls = calls_of_a_step(stepper, batches)
    return Measured(
        ranks=runtime.world,
        device=runtime.device_name,
        threads=torch.get_num_threads(),
        images_per_rank=config.train.batch_size // runtime.world,
        steps=steps,
        images_per_s=config.train.batch_size / step_s,
        step_s=step_s,
        backward_s=backward_s,
        collectives=as_traffic(calls),
        alone_s=max(runtime.gather(seconds_alone(calls, runtime))),
    )


def make_stepper(pipeline: Pipeline) -> Stepper:
    """What trains in the first epoch in which the backbone does, without a run folder."""
    config = pipeline.config
    network = make_network(pipeline, pretrained=False)
    return Stepper(
        with_encoder_of(pipeline, network),
        network,
        loss=make_loss(pipeline),
        schedule=make_schedule(pipeline),
        ema=build_ema(network, config.train.ema_decay),
        blocks=blocks_of_epoch(config, config.train.head_warmup_epochs),
        moments={},
        loss_scale=None,
        request=StopRequest(),
        saver=Saver(every_minutes=0),
    )


def one_batch_again_and_again(pipeline: Pipeline) -> Iterator[Batch]:
    """This rank's micro-batches of the first global batch, for ever: no time goes into reading."""
    config, runtime = pipeline.config, pipeline.runtime
    stream = train_stream(
        pipeline.manifest,
        labels=pipeline.labels,
        seed=config.seed,
        epoch=0,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        world=runtime.world,
        rank=runtime.rank,
        start_batch=0,
        last_batch=config.data.last_batch,
        block_shards=config.data.shuffle_block_shards,
        workers=0,
        prefetch_batches=1,
        pin_memory=False,
        features=pipeline.features,
    )
    return itertools.cycle(list(itertools.islice(stream, config.train.accumulation)))


def backward_seconds(stepper: Stepper, batches: Iterator[Batch], accumulation: int) -> float:
    """Of one micro-step: the best of three steps whose phases are timed exactly."""
    best_s = float("inf")
    for _ in range(3):
        timer = PhaseTimer(stepper.pipeline.runtime.synchronize)
        timer.start(exact=True)
        stepper(batches, epoch=0, step=0, timer=timer)
        best_s = min(best_s, timer.seconds["backward"] / accumulation)
    return best_s


def calls_of_a_step(stepper: Stepper, batches: Iterator[Batch]) -> Counter[Call]:
    """The collectives of one optimizer step."""
    runtime = stepper.pipeline.runtime
    with counted(runtime.world) as calls:
        stepper(batches, epoch=0, step=0, timer=PhaseTimer(runtime.synchronize))
    return calls


def engine_of(config: Config) -> Engine:
    """The engine of an experiment, as projections name it."""
    names: dict[int, Engine] = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
    return "ddp" if config.train.engine == "ddp" else names[config.train.zero_stage]


def parameters_of(config: Config, manifest: Manifest) -> Parameters:
    """Sizes of the network's parameters; nothing is computed."""
    with torch.device("meta"):
        network = build_network(config, (manifest.height_px, manifest.width_px), pretrained=False)
    set_trainable(network, blocks_of_epoch(config, config.train.head_warmup_epochs))
    return parameters_in(network, config.optim, threshold=_PERSISTENT)


def parameters_in(network: MILModel, optim: OptimConfig, *, threshold: int) -> Parameters:
    """Sizes of a network's parameters, where ZeRO-3 keeps those of up to `threshold` numbers whole."""
    parameters = list(network.parameters())
    divided, whole = ([p for p in parameters if (p.numel() > threshold) == large] for large in (True, False))
    return Parameters(
        trained_bytes=_bytes(p for p in parameters if p.requires_grad),
        divided_bytes=_bytes(divided),
        whole_bytes=_bytes(whole),
        whole_tensors=len(whole),
        groups=len(build_optimizer(network, optim).param_groups),
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(4 * p.numel() for p in parameters)


def reading_of(manifest: Manifest) -> Reading:
    """Stored bytes of a training image, and seconds of one core to decode it, both from the first few."""
    rows = manifest.rows("train")[:_DECODED].tolist()
    records = [manifest.record(row) for row in rows]
    reader = ShardReader(manifest)
    for row in rows:
        reader.read(row)  # the page cache is warm afterwards: what is timed is no disk
    best_s = float("inf")
    for _ in range(_DECODE_ROUNDS):
        start_s = time.process_time()  # of this process: whoever else uses the cores does not count
        for row in rows:
            reader.read(row)
        best_s = min(best_s, (time.process_time() - start_s) / len(rows))
    return Reading(image_bytes=sum(r.num_bytes for r in records) / len(records), decode_s=best_s)
