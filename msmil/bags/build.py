"""From a batch of stored images to the bags a model is called on, on the images' device.

B images, H W pixels, N tiles, C channels, P tile side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msmil.bags.augment import apply, draw
from msmil.bags.normalise import local_contrast, standard_black, standardise, to_unit
from msmil.bags.tiling import make_bag
from msmil.config import BagConfig
from msmil.types import Bag


class BagMaker:
    """Makes bags as `config` says: to 0..1, augment, local contrast, standardise, pad with black, tile.

    Args:
        config: how images become instances.
        in_channels: channels of the backbone's input; 3 repeats the grey image.
        seed: of the augmentation.
        sizes: tile sizes in pixels where an instance is a tile (see `make_bag`).
    """

    def __init__(
        self, config: BagConfig, *, in_channels: int, seed: int, sizes: int | tuple[int, ...] | None = None
    ) -> None:
        self.config = config
        self.sizes = sizes
        self.in_channels = in_channels
        self.seed = seed

    @torch.no_grad()
    def __call__(self, image_B1HW: Tensor, *, augment: tuple[int, Tensor] | None) -> Bag:
        """Bags of uint8 or uint16 images on any device, float32 whatever autocast is on.

        `augment` is (epoch, sample_B) while training, with the int64 manifest rows on the CPU, else None.
        """
        config = self.config
        with torch.autocast(image_B1HW.device.type, enabled=False):
            x_B1HW = to_unit(image_B1HW)
            if augment is not None:
                epoch, sample_B = augment
                x_B1HW = apply(x_B1HW, draw(config.augment, seed=self.seed, epoch=epoch, sample_B=sample_B))
            return self.of_unit(x_B1HW)

    def of_unit(self, x_B1HW: Tensor) -> Bag:
        """Bags of float32 images in 0..1: all that follows the augmentation, in plain operations (for an export)."""
        config = self.config
        if config.local_contrast > 0:
            x_B1HW = local_contrast(x_B1HW, gain=config.local_contrast, sigma_px=config.local_contrast_sigma_px)
        x_B1HW = standardise(x_B1HW, mean=config.mean, std=config.std)
        black = standard_black(config.mean, config.std)
        return make_bag(x_B1HW, config, in_channels=self.in_channels, black=black, sizes=self.sizes)
