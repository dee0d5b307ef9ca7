"""What training and evaluation share: the data set, the bag maker and the network of one configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from msmil.bags.build import BagMaker
from msmil.bags.tiling import padded_size, tile_hw, tile_origins
from msmil.config import Config
from msmil.config_checks import tile_sizes
from msmil.engine.data import open_data
from msmil.engine.features import check_encoder, choose_levels, open_features
from msmil.engine.runtime import Runtime
from msmil.models.build import build_model
from msmil.models.mil import MILModel
from msmil.types import Bag
from shards.features import Features
from shards.manifest import Manifest
from shards.types import Batch


@dataclass(frozen=True)
class Pipeline:
    """One configuration on one data set in one process."""

    config: Config
    runtime: Runtime
    manifest: Manifest
    bags: BagMaker
    features: Features | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that are learned, in order."""
        return self.config.data.labels

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of stored images in pixels."""
        return self.manifest.height_px, self.manifest.width_px

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Height and width of a tile in pixels; the padded image's in `image` mode."""
        return tile_hw(padded_size(*self.image_hw, self.config.bags), self.config.bags)

    def bag(self, batch: Batch, *, epoch: int | None) -> Bag | None:
        """The bags of a batch on the device, None where it holds no images; augmented in an `epoch` of training."""
        if batch.image_B1HW is None:
            return None
        image_B1HW = to_device(batch.image_B1HW, self.runtime.device)
        return self.bags(image_B1HW, augment=None if epoch is None else (epoch, batch.sample_B))

    def model_input(self, batch: Batch, bag: Bag | None) -> dict[str, Any]:
        """What the network is called on: stored features where the batch has them (as float32), else tiles."""
        if batch.levels is None:
            assert bag is not None
            return {"tiles_BNCPP": bag.tiles_BNCPP}
        levels = {level: to_device(x, self.runtime.device).float() for level, x in batch.levels.items()}
        return {"tiles_BNCPP": None, "levels": levels}


def open_pipeline(config: Config, runtime: Runtime) -> Pipeline:
    """The data set, with its features where they are named, and the bag maker of a configuration."""
    sizes = tile_sizes(config.model)
    bags = BagMaker(config.bags, in_channels=config.model.in_channels, seed=config.seed, sizes=sizes)
    manifest = open_data(config)
    features = open_features(config, manifest)
    return Pipeline(config=config, runtime=runtime, manifest=manifest, bags=bags, features=features)


def with_encoder_of(pipeline: Pipeline, network: MILModel) -> Pipeline:
    """The same pipeline with the levels of its features that the network needs, if it has features.

    Raises:
        UserError: the features are not of this network's encoder.
    """
    if pipeline.features is None:
        return pipeline
    features = choose_levels(pipeline.features, network)
    check_encoder(features, pipeline.config.model, network)
    return replace(pipeline, features=features)


def build_network(config: Config, image_hw: tuple[int, int], *, pretrained: bool) -> MILModel:
    """The network of a configuration for stored images of this size, on the default device.

    `pretrained` says whether model.pretrained is obeyed: not when weights are loaded right afterwards.
    """
    padded_hw = padded_size(*image_hw, config.bags)
    return build_model(
        replace(config.model, pretrained=config.model.pretrained and pretrained),
        num_labels=len(config.data.labels),
        padded_hw=padded_hw,
        tile_hw=tile_hw(padded_hw, config.bags),
        tiles=len(tile_origins(padded_hw, config.bags)),
    )


def known_labels(manifest: Manifest, rows_N: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """label_NK (int8: 1, 0, -1 unknown) of these rows."""
    return manifest.label_NK(labels, rows_N)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that does not block when the source is pinned."""
    return tensor.to(device, non_blocking=True)
