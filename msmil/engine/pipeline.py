"""What training and evaluation share: the data set, the bag maker and the network of one configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from msmil.bags.build import BagMaker
from msmil.bags.tiling import padded_size, tile_hw, tile_origins
from msmil.config import Config
from msmil.config_checks import tile_sizes
from msmil.engine.runtime import Runtime
from msmil.models.build import build_model
from msmil.models.mil import MILModel
from shards.errors import UserError
from shards.manifest import Manifest, check_shards, read_manifest


@dataclass(frozen=True)
class Pipeline:
    """One configuration on one data set in one process."""

    config: Config
    runtime: Runtime
    manifest: Manifest
    bags: BagMaker

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


def open_data(config: Config) -> Manifest:
    """Read and check the data set of a configuration: shards whole, labels known.

    Raises:
        UserError: as read_manifest and check_shards; a label that the manifest does not have.
    """
    manifest = read_manifest(config.data.shards)
    for label in config.data.labels:
        if label not in manifest.labels:
            fix = f"choose from {', '.join(manifest.labels)}"
            raise UserError(f"data.labels names {label!r}, which is not packed", file=manifest.directory, fix=fix)
    check_shards(manifest)
    return manifest


def open_pipeline(config: Config, runtime: Runtime) -> Pipeline:
    """The data set and the bag maker of a configuration."""
    sizes = tile_sizes(config.model)
    bags = BagMaker(config.bags, in_channels=config.model.in_channels, seed=config.seed, sizes=sizes)
    return Pipeline(config=config, runtime=runtime, manifest=open_data(config), bags=bags)


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
    label_NK: np.ndarray = manifest.label_NK(labels)[rows_N]
    return label_NK


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that does not block when the source is pinned."""
    return tensor.to(device, non_blocking=True)
