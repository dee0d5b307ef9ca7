"""Ranges of numbers in a configuration. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msmil.config_checks import require as _require

if TYPE_CHECKING:
    from msmil.config import Config


def check_ranges(config: Config) -> None:
    """Refuse numbers outside their range.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    parts = (config.data, config.bags, config.bags.augment, config.model, config.loss, config.optim, config.train)
    names = ("data", "bags", "bags.augment", "model", "loss", "optim", "train")
    values = {f"{n}.{k}": v for n, part in zip(names, parts, strict=True) for k, v in vars(part).items()}
    values["seed"] = config.seed
    for section in ("checkpoint", "evaluate", "tracking"):
        values |= {f"{section}.{k}": v for k, v in vars(getattr(config, section)).items()}
    for key, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(n) for n in numbers if isinstance(n, float))
        _require(finite, key, value, "give a finite number")
    for key in _AT_LEAST_ONE:
        _require(values[key] >= 1, key, values[key], "give a number of at least 1")
    for key in _NOT_NEGATIVE:
        _require(values[key] >= 0, key, values[key], "give a number that is not negative")
    for key in _BELOW_ONE:
        _require(0 <= values[key] < 1, key, values[key], "give a number in 0 <= x < 1")
    for key in _UP_TO_ONE:
        _require(0 <= values[key] <= 1, key, values[key], "give a number in 0 <= x <= 1")
    for key in ("bags.std", "bags.local_contrast_sigma_px", "optim.lr", "data.cache_gb", "data.request_timeout_s"):
        _require(values[key] > 0, key, values[key], "give a number above 0")
    blocks = config.train.trainable_blocks
    _require(blocks == "all" or int(blocks) >= 1, "train.trainable_blocks", blocks, "give all, or at least 1")
    fractions = config.loss.top_fractions
    fix = "give shares in 0 < x <= 1, for example [0.005, 0.02]"
    _require(len(fractions) > 0 and all(0 < f <= 1 for f in fractions), "loss.top_fractions", list(fractions), fix)
    _require("/" not in config.name and config.name.strip(".") != "", "name", config.name, "give a plain folder name")


_AT_LEAST_ONE = (
    "data.shuffle_block_shards", "data.prefetch_batches", "bags.tile_size_px", "bags.pad_multiple_px",
    "bags.augment.cutout_px", "model.fpn_dim", "model.encoder_dim", "model.encoder_blocks", "model.encoder_heads",
    "model.attention_dim", "model.pma_heads", "train.epochs", "train.batch_size", "train.accumulation",
    "train.timeout_s", "checkpoint.keep_last", "checkpoint.keep_best", "evaluate.every_epochs", "evaluate.batch_size",
    "evaluate.bootstrap_replicates", "tracking.every_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "data.fold_seed", "data.fraction_seed", "data.workers", "data.request_retries", "bags.local_contrast",
    "tracking.images",
    "bags.augment.rotation_deg", "bags.augment.gamma", "bags.augment.noise_sd", "bags.augment.cutout_count",
    "loss.instance_weight", "loss.composite_weight", "optim.backbone_lr_factor", "optim.weight_decay",
    "optim.warmup_epochs", "optim.clip_grad_norm", "train.head_warmup_epochs", "checkpoint.every_steps",
    "checkpoint.every_minutes", "evaluate.gallery",
)  # fmt: skip
_BELOW_ONE = (
    "bags.tile_overlap", "bags.augment.scale", "bags.augment.gain", "bags.augment.offset", "model.drop_path_rate",
    "model.encoder_dropout", "model.attention_dropout", "model.classifier_dropout", "optim.beta1", "optim.beta2",
    "train.ema_decay", "evaluate.confidence",
)  # fmt: skip
_UP_TO_ONE = (
    "data.max_skipped_fraction", "bags.augment.horizontal_flip", "bags.augment.vertical_flip",
    "loss.uniform_attention_share",
)  # fmt: skip
