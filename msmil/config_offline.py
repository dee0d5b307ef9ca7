"""What a configuration cannot ask for where stored features take the place of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.config import Config

_OFF = "leave data.features empty"


def check_offline(config: Config) -> None:
    """Refuse an encoder that moves, and images that change: neither happens to stored features.

    Raises:
        UserError: the option, its value, and what to set instead.
    """
    train = config.train
    if train.encoder != "frozen":
        raise UserError(
            f"train.encoder (with data.features) is {train.encoder!r}", fix=f"set train.encoder: frozen, or {_OFF}"
        )
    for key, value in vars(config.bags.augment).items():
        if key != "cutout_px" and value != 0:
            name = f"bags.augment.{key}"
            fix = f"set {name}: 0, since stored features are those of unchanged images, or {_OFF}"
            raise UserError(f"{name} (with data.features) is {value!r}", fix=fix)
    if train.gradient_checkpointing:
        fix = f"set train.gradient_checkpointing: false, since the backbone does not run, or {_OFF}"
        raise UserError("train.gradient_checkpointing (with data.features) is True", fix=fix)
