"""A training step without an engine around it, in any mode; and the published way of doing it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from msmil.bags.build import BagMaker
from msmil.config import Config
from msmil.config_checks import tile_sizes
from msmil.engine.bench.arithmetic import DTYPES
from msmil.engine.bf16 import compute_bf16
from msmil.engine.environment import without_engine
from msmil.engine.optim import build_optimizer
from msmil.engine.pipeline import Pipeline, to_device
from msmil.engine.run import make_loss, make_network
from msmil.engine.train import blocks_of_epoch
from msmil.models.backbone import set_trainable
from shards.types import Batch

PUBLISHED_TILE_PX: Final = 512
_PUBLISHED_ENCODERS: Final = {"efficientnet_b2": "mammoclip_b2", "efficientnet_b5": "mammoclip_b5"}
_WAYS: Final = ("fp32", "bf16")


@dataclass(frozen=True)
class Mode:
    """What may speed a step up: precision, memory format of convolutions, compilation."""

    precision: str
    channels_last: bool
    compiled: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.precision} {layout} {'compiled' if self.compiled else 'eager'}"


def modes(which: str) -> list[Mode]:
    """Every combination (`all`), or (`each`) none, each alone, and all together; what is compiled comes last."""
    every = [Mode(p, last, compiled) for compiled in (False, True) for p in _WAYS for last in (False, True)]
    if which == "all":
        return every
    count = {mode: (mode.precision == "bf16") + mode.channels_last + mode.compiled for mode in every}
    return [mode for mode in every if count[mode] <= 1 or str(mode).startswith("bf16 channels_last")]


def in_mode(config: Config, mode: Mode) -> Config:
    """The configuration in a mode."""
    changed: Any = {"precision": mode.precision, "channels_last": mode.channels_last, "compile": mode.compiled}
    return replace(config, train=replace(without_engine(config.train), **changed))


def in_tiles(config: Config) -> Config:
    """The configuration on separate tiles."""
    bags = replace(config.bags, instances="tiles", tile_size_px=PUBLISHED_TILE_PX, tile_overlap=0.0)
    return replace(config, bags=bags)


def published_way(config: Config) -> Config:
    """The same network, loss, optimizer and trainable blocks as the published system computes them.

    fp32, three equal channels, contiguous memory, separate tiles of 512 pixels (one pass over all of an image's), the
    published encoder's padding, nothing compiled or recomputed. Kept is what says what is learned. Its logits are the
    published ones (tests/msmil/engine/bench/test_published.py holds them to tests/parity/data).
    """
    name = _PUBLISHED_ENCODERS.get(config.model.backbone, config.model.backbone)
    model = replace(config.model, backbone=name, in_channels=3, pretrained=False, weights="")
    tiles = replace(in_tiles(config).bags, padding="legacy")
    plain = in_mode(replace(config, model=model, bags=tiles), Mode("fp32", channels_last=False, compiled=False))
    return replace(plain, train=replace(plain.train, gradient_checkpointing=False))


def pipeline_of(pipeline: Pipeline, config: Config) -> Pipeline:
    """The same data on the same device in another configuration."""
    sizes = tile_sizes(config.model)
    bags = BagMaker(config.bags, in_channels=config.model.in_channels, seed=config.seed, sizes=sizes)
    return replace(pipeline, config=config, bags=bags)


class PlainStep:
    """A network with its loss and optimizer, stepped as a short script would: no ranks, no engine, no log."""

    def __init__(self, pipeline: Pipeline) -> None:
        config, device = pipeline.config, pipeline.runtime.device
        self.pipeline = pipeline
        self.network = make_network(pipeline, pretrained=False)
        set_trainable(self.network, blocks_of_epoch(config, config.train.epochs - 1))
        self._called: Any = torch.compile(self.network) if config.train.compile else self.network
        self._loss = make_loss(pipeline)
        self._optimizer = build_optimizer(self.network, config.optim)
        precision = config.train.precision
        if precision == "bf16" and device.type == "cpu":
            compute_bf16()
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._autocast = functools.partial(
            torch.autocast, device.type, dtype=DTYPES[precision], enabled=precision != "fp32"
        )

    def __call__(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on these micro-batches."""
        self.network.train()
        for batch in batches:
            self._scaler.scale(self.loss(batch)).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, with its graph."""
        config, device = self.pipeline.config, self.pipeline.runtime.device
        tiles = self.pipeline.model_input(batch, self.pipeline.bag(batch, epoch=0))
        with self._autocast():
            output = self._called(**tiles, **self._loss.asks)
            total: Tensor = self._loss(
                output,
                to_device(batch.label_BK, device),
                to_device(batch.weight_B, device),
                global_count=config.train.batch_size * len(self.pipeline.labels),
            ).total
        return total


def pixels_per_image(pipeline: Pipeline, batch: Batch) -> int:
    """Pixels that the encoder sees."""
    bag = pipeline.bag(batch, epoch=None)
    assert bag is not None
    parts = bag.tiles_BNCPP.values() if isinstance(bag.tiles_BNCPP, dict) else [bag.tiles_BNCPP]
    return sum(part[:, :, 0].numel() for part in parts) // len(batch.sample_B)
