"""What types cannot tell of data, engines and models: settings that exclude each other. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.config import Config, DataConfig, ModelConfig, TrainConfig

PYRAMIDS: Final = ("fpn", "backbone_pyramid")
_WITHOUT_ATTENTION: Final = ("max", "mean")
_OF_PROBABILITIES: Final = ("mean_p", "max_p")


def require(ok: bool, key: str, value: object, fix: str) -> None:
    """Refuse a value with the way to repair it."""
    if not ok:
        raise UserError(f"{key} is {value!r}", fix=fix)


def has_fused_head(model: ModelConfig) -> bool:
    """Whether the aggregated logit is that of a head of its own, and not of the scales' probabilities."""
    return model.instance_encoder == "single" or model.scale_aggregator not in _OF_PROBABILITIES


def tile_sizes(model: ModelConfig) -> int | tuple[int, ...] | None:
    """Sizes in pixels of the tiles that are instances: one, several (msp), or None where bags.tile_size_px holds."""
    if model.instance_encoder in PYRAMIDS:
        return None
    return model.scales[0] if model.instance_encoder == "single" else model.scales


def check_folds(data: DataConfig) -> None:
    """Refuse folds that are no cross-validation, and a fold that is not one of them.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    folds = data.folds
    fix = "give a number of at least 2, table or none"
    require(isinstance(folds, str) or folds >= 2, "data.folds", folds, fix)
    require(data.fold >= 0, "data.fold", data.fold, "give a number that is not negative")
    if folds == "none":
        require(data.fold == 0, "data.fold", data.fold, "set data.folds too")
    elif folds != "table":
        require(data.fold < folds, "data.fold", data.fold, f"give a number from 0 to {folds - 1}")
    if data.fold_rule == "legacy":
        key, fix = "data.fold_rule", "set data.fold_rule: seeded, or "
        require(isinstance(folds, int), f"{key} (with data.folds: {folds})", "legacy", f"{fix}a number of folds")
        one = len(data.labels) == 1
        require(one, f"{key} (with {len(data.labels)} data.labels)", "legacy", f"{fix}name the one label")
        require(data.fold_seed == 0, "data.fold_seed", data.fold_seed, f"{fix}leave it at 0: legacy folds have no seed")


def check_order(data: DataConfig) -> None:
    """Refuse a share of no patients, and whole exams together with what would cut or repeat them.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    require(0 < data.fraction <= 1, "data.fraction", data.fraction, "give a number in 0 < x <= 1")
    if data.fraction == 1:
        require(data.fraction_seed == 0, "data.fraction_seed", data.fraction_seed, "set data.fraction too")
    if data.group_by == "none":
        return
    for key, only in (("sampling", "uniform"), ("last_batch", "pad")):
        value, name = getattr(data, key), f"data.{key} (with group_by: {data.group_by})"
        require(value == only, name, value, f"set data.{key}: {only}, or data.group_by: none")


def check_frozen(train: TrainConfig) -> None:
    """Refuse what makes no sense of an encoder that does not train.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    if train.encoder != "frozen":
        return
    fix = "set train.trainable_blocks: all, or train.encoder: finetune"
    require(train.trainable_blocks == "all", "train.trainable_blocks", train.trainable_blocks, fix)
    fix = "set train.head_warmup_epochs: 0, or train.encoder: finetune"
    require(train.head_warmup_epochs == 0, "train.head_warmup_epochs", train.head_warmup_epochs, fix)
    fix = "set train.batch_norm: frozen; a frozen encoder runs in eval mode"
    require(train.batch_norm == "frozen", "train.batch_norm", train.batch_norm, fix)


def check_engine(train: TrainConfig) -> None:
    """Refuse engine settings that contradict each other, and what DeepSpeed cannot do exactly.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    if train.engine == "ddp":
        fix = "set train.engine: deepspeed, or train.offload_optimizer: false"
        require(not train.offload_optimizer, "train.offload_optimizer", True, fix)
        stage = type(train).zero_stage
        fix = f"set train.engine: deepspeed, or train.zero_stage: {stage}, its default"
        require(train.zero_stage == stage, "train.zero_stage (with engine: ddp)", train.zero_stage, fix)
        return
    fix = "set train.compile: false, or train.engine: ddp"
    require(not train.compile, "train.compile (with engine: deepspeed)", train.compile, fix)
    fix = "set train.zero_stage to 1, 2 or 3; stage 0 divides nothing and offloads nothing"
    require(not (train.offload_optimizer and train.zero_stage == 0), "train.offload_optimizer", True, fix)
    fix = "set train.ema_decay: 0, or a train.zero_stage of at most 2: stage 3 holds no whole weights to average"
    require(not (train.ema_decay and train.zero_stage == 3), "train.ema_decay", train.ema_decay, fix)


def check_model(config: Config) -> None:
    """Refuse model settings that contradict each other, the bags or the loss.

    Raises:
        UserError: naming the key, its value and the fix.
    """
    _check_scales(config)
    _check_encoder(config.model)
    _check_pooling(config)
    _check_nested(config)
    model, loss = config.model, config.loss
    if not model.deep_supervision:
        fix = f"set model.deep_supervision: true, since {model.scale_aggregator} merges what the scales' heads say"
        require(has_fused_head(model), "model.deep_supervision", False, fix)
    for key, weight in (("instance", loss.instance_weight), ("composite", loss.composite_weight)):
        fix = "set model.deep_supervision: true, since the heads of the scales judge instances"
        judges = model.deep_supervision or model.instance_encoder == "single"
        require(judges or weight == 0, f"model.deep_supervision (with loss.{key}_weight)", False, fix)


def _check_scales(config: Config) -> None:
    model, bags = config.model, config.bags
    scales = list(model.scales)
    ascending = len(scales) > 0 and scales == sorted(set(scales)) and scales[0] > 0
    if model.instance_encoder in PYRAMIDS:
        fix = "give powers of two in ascending order, for example [16, 32, 128]"
        require(ascending and all(s & (s - 1) == 0 for s in scales), "model.scales", scales, fix)
        fix = f"make it a multiple of the coarsest stride, {scales[-1]}"
        key = "pad_multiple_px" if bags.instances == "image" else "tile_size_px"
        require(getattr(bags, key) % scales[-1] == 0, f"bags.{key}", getattr(bags, key), fix)
    else:
        require(ascending, "model.scales", scales, "give tile sizes in pixels in ascending order, as [128, 256, 384]")
        fix = f"set bags.instances: tiles, since {model.instance_encoder} makes an instance of each tile"
        require(bags.instances == "tiles", "bags.instances", bags.instances, fix)
    if model.instance_encoder == "single":
        require(len(scales) == 1, "model.scales", scales, "give one tile size, or set model.instance_encoder: msp")
        for key, only in (("scale_aggregator", "gated_attention"), ("deep_supervision", True)):
            fix = f"leave it at {str(only).lower()}, its default: there is one scale with one head"
            value = getattr(model, key)
            require(value == only, f"model.{key} (with instance_encoder: single)", value, fix)
    if isinstance(model.inducing_points, tuple):
        fix = f"give one positive number per scale of {scales}, or auto"
        points = model.inducing_points
        require(len(points) == len(scales) and min(points) > 0, "model.inducing_points", list(points), fix)


def _check_encoder(model: ModelConfig) -> None:
    if model.instance_encoder != "fpn":
        fix = "set model.upsample: nearest, since only fpn brings levels to another size"
        require(model.upsample == "nearest", "model.upsample", model.upsample, fix)
    if model.instance_encoder not in PYRAMIDS:
        fix = f"set model.pyramid_norm: false, since {model.instance_encoder} has no pyramid"
        require(not model.pyramid_norm, "model.pyramid_norm", model.pyramid_norm, fix)
    encoders = {model.mil_encoder, _region_choice(model.region_mil_encoder, model.mil_encoder)}
    if "mlp" not in encoders:
        fix = "set model.encoder_dropout: 0, since only the mlp encoder has a dropout"
        require(model.encoder_dropout == 0, "model.encoder_dropout", model.encoder_dropout, fix)


def _check_pooling(config: Config) -> None:
    model = config.model
    poolings = {model.pooling, _region_choice(model.region_pooling, model.pooling)}
    if poolings <= set(_WITHOUT_ATTENTION):
        fix = f"set model.probability: softmax, since {model.pooling} pooling has no attention"
        require(model.probability == "softmax", "model.probability", model.probability, fix)
    if poolings & set(_WITHOUT_ATTENTION):
        share = config.loss.uniform_attention_share
        fix = "set loss.uniform_attention_share: 0, since max and mean pooling have no attention"
        require(share == 0, "loss.uniform_attention_share", share, fix)


def _check_nested(config: Config) -> None:
    model = config.model
    if not model.nested:
        for key, unused in (("mil_encoder", "same"), ("pooling", "same"), ("inducing_points", "auto")):
            value = getattr(model, f"region_{key}")
            fix = f"set model.nested: true, or model.region_{key}: {unused}"
            require(value == unused, f"model.region_{key}", value, fix)
        return
    fix = "set model.instance_encoder: fpn or backbone_pyramid, or model.nested: false"
    require(model.instance_encoder in PYRAMIDS, "model.instance_encoder (nested)", model.instance_encoder, fix)
    fix = "set bags.instances: tiles, since the regions of nested MIL are tiles"
    require(config.bags.instances == "tiles", "bags.instances", config.bags.instances, fix)
    points = model.region_inducing_points
    fix = "give a number of at least 1, or auto"
    require(points == "auto" or int(points) >= 1, "model.region_inducing_points", points, fix)
    for key in ("instance_weight", "composite_weight"):
        value = getattr(config.loss, key)
        fix = f"set loss.{key}: 0, since the heads of nested MIL judge regions, or model.nested: false"
        require(value == 0, f"loss.{key}", value, fix)


def _region_choice(region: str, instance: str) -> str:
    return instance if region == "same" else region
