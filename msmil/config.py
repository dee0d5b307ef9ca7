"""The configuration of an experiment: frozen dataclasses whose field docs are the reference.

Read from YAML and `a.b=c` overrides by msmil.config_io. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from msmil.config_checks import check_engine, check_folds, check_frozen, check_model, check_order
from msmil.config_checks import require as _require
from msmil.config_offline import check_offline
from msmil.config_ranges import check_ranges
from shards.remote.url import check_url, is_url


def opt(default: Any, doc: str) -> Any:
    """A field with its default and the one sentence that --help and the reference print."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and which labels are learned."""

    shards: str = opt("data/shards", "folder that `msmil pack` wrote, or its address (https://, s3://, gs://, ...)")
    features: str = opt(
        "", "folder that `msmil extract` wrote: its features are read instead of images (train.encoder: frozen)"
    )
    cache_dir: str = opt("", "of an address: folder on a local disk for what was fetched; empty: where TMPDIR is")
    cache_gb: float = opt(20.0, "of an address: what images may take in that folder, in GB")
    request_timeout_s: float = opt(30.0, "of an address: seconds that a request may stall")
    request_retries: int = opt(5, "of an address: how often a request is made again, after a growing pause")
    labels: tuple[str, ...] = opt(("Mass",), "labels of the manifest that the model learns, in this order")
    folds: Literal["none", "table"] | int = opt(
        "none", "cross-validation: folds of all patients outside test, seeded, or those of the packed table"
    )
    fold: int = opt(0, "the fold that validates; the other folds train (`msmil repeat --folds` goes through all)")
    fold_seed: int = opt(0, "seed of the folds; apart from seed, so that repeated runs share them")
    fold_rule: Literal["seeded", "legacy"] = opt("seeded", "how folds are drawn; legacy: as published, for one label")
    fraction: float = opt(
        1.0, "share of the training patients that train, alike in labels; a smaller share is part of a larger one"
    )
    fraction_seed: int = opt(0, "seed of that share; apart from seed, so that repeated runs share it")
    sampling: Literal["uniform", "class_balanced"] = opt(
        "uniform", "each image once an epoch; or as many draws of each label's positives, and of images without any"
    )
    group_by: Literal["none", "exam"] = opt(
        "none",
        "exam: all images of an exam are in one global batch; places where no exam fits are filled with weight 0",
    )
    last_batch: Literal["pad", "drop", "wrap"] = opt(
        "pad",
        "last global batch of an epoch: fill with weight 0, leave out, or fill with the epoch's first images again",
    )
    shuffle_block_shards: int = opt(16, "samples are shuffled inside blocks of this many shards")
    workers: int = opt(2, "decoding processes per rank; 0 decodes in the training process")
    prefetch_batches: int = opt(2, "batches each decoding process keeps ready")
    on_error: Literal["stop", "skip"] = opt(
        "stop",
        "a training image that cannot be read stops the run, or is skipped, counted and named in the log; "
        "evaluation always stops, since metrics count every image once",
    )
    max_skipped_fraction: float = opt(0.01, "on_error: skip: more than this share of an epoch's images stops the run")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images on the device; each draw is a function of (seed, epoch, sample)."""

    horizontal_flip: float = opt(0.5, "probability of mirroring left and right")
    vertical_flip: float = opt(0.5, "probability of mirroring top and bottom")
    rotation_deg: float = opt(0.0, "largest rotation in degrees, either way")
    scale: float = opt(0.0, "largest relative change of size, either way")
    gamma: float = opt(0.0, "largest |log| of the exponent applied to intensities in 0..1")
    gain: float = opt(0.0, "largest relative change of intensity, either way")
    offset: float = opt(0.0, "largest shift of intensity in 0..1, either way; air stays black")
    noise_sd: float = opt(0.0, "largest standard deviation of added Gaussian noise, intensity in 0..1")
    cutout_count: int = opt(0, "number of squares set to black")
    cutout_px: int = opt(64, "side of such a square in pixels")


@dataclass(frozen=True, kw_only=True)
class BagConfig:
    """How an image becomes a bag of instances, on the device."""

    instances: Literal["image", "tiles"] = opt(
        "image", "one fully convolutional pass over the image, or tiles (published)"
    )
    tile_size_px: int = opt(
        512, "side of a tile in pixels (instances: tiles); for msp and single, the image is padded to a multiple of it"
    )
    tile_overlap: float = opt(0.0, "share of a tile that the next one repeats, 0 <= x < 1 (instances: tiles)")
    padding: Literal["least", "legacy"] = opt("least", "legacy: a side that fits gets a whole tile more, as published")
    pad_multiple_px: int = opt(128, "image is padded with black up to a multiple of this (instances: image)")
    mean: float = opt(0.3089279, "mean subtracted from intensities in 0..1")
    std: float = opt(0.25053555408335154, "divisor after the mean")
    local_contrast: float = opt(0.0, "gain of the local contrast step x + gain * (x - Gaussian(x)); 0 is off")
    local_contrast_sigma_px: float = opt(3.0, "standard deviation of that Gaussian in pixels")
    augment: AugmentConfig = opt(AugmentConfig, "random changes of training images")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone -> instances of each scale -> MIL per scale -> scale aggregation."""

    backbone: str = opt("efficientnet_b2", "a timm model that supports features_only; mammoclip_b2, mammoclip_b5")
    weights: str = opt("", "folder with weights to start from, as `msmil convert` writes it; empty: none")
    backbone_options: dict[str, Any] = opt(dict, "further arguments of timm.create_model")
    pretrained: bool = opt(False, "start from timm's pretrained weights (needs the hub or its cache)")
    in_channels: Literal[1, 3] = opt(1, "channels of the backbone's input; 3 repeats the grey image")
    drop_path_rate: float = opt(0.0, "stochastic depth of the backbone, largest rate")
    instance_encoder: Literal["fpn", "backbone_pyramid", "msp", "single"] = opt(
        "fpn", "instances: cells of a top-down pyramid, of a lateral one, tiles of several sizes, or of a single size"
    )
    scales: tuple[int, ...] = opt(
        (16, 32, 128), "strides (beyond the backbone's last: subsampled); tile sizes in pixels for msp and single"
    )
    fpn_dim: int = opt(256, "channels of the pyramid")
    upsample: Literal["nearest", "bilinear"] = opt("nearest", "fpn: how a coarser level is brought to a finer size")
    pyramid_norm: bool = opt(False, "one GroupNorm behind all of the pyramid's convolutions, which then have no bias")
    nested: bool = opt(False, "MIL inside each tile, then over the tiles (regions), with pyramids")
    region_mil_encoder: Literal["same", "mlp", "sab", "isab"] = opt("same", "nested: encoder of regions, all scales")
    region_pooling: Literal["same", "max", "mean", "attention", "gated_attention", "pma"] = opt(
        "same", "nested: regions -> embedding per label"
    )
    region_inducing_points: Literal["auto"] | int = opt("auto", "nested, isab over regions: its inducing points")
    mil_encoder: Literal["mlp", "sab", "isab"] = opt("mlp", "encoder of instances, one per scale")
    encoder_dim: int = opt(256, "width of encoded instances")
    encoder_dropout: float = opt(0.0, "dropout in the mlp encoder")
    encoder_blocks: int = opt(2, "blocks of sab and isab")
    encoder_heads: int = opt(4, "attention heads of sab and isab")
    encoder_layer_norm: bool = opt(False, "layer norm in sab, isab and pma")
    inducing_points: Literal["auto"] | tuple[int, ...] = opt("auto", "isab: per scale; auto: 10 log10(instances)")
    pooling: Literal["max", "mean", "attention", "gated_attention", "pma"] = opt(
        "gated_attention", "instances -> embedding per label"
    )
    probability: Literal["softmax", "sparsemax", "entmax15", "entmax_alpha"] = opt(
        "softmax", "attention scores -> weights of instances; entmax_alpha learns its alpha"
    )
    attention_dim: int = opt(128, "hidden width of attention pooling and of the scale attention")
    attention_dropout: float = opt(0.0, "dropout inside attention pooling and the scale attention")
    pma_heads: int = opt(1, "attention heads of pma")
    attention: Literal["per_label", "shared"] = opt("per_label", "each label has its own attention, or all share one")
    scale_aggregator: Literal["concatenation", "mean_p", "max_p", "attention", "gated_attention"] = opt(
        "gated_attention", "how scales are merged: embeddings, or their heads' probabilities (_p); single has one"
    )
    deep_supervision: bool = opt(True, "a head and a loss per scale; single has one head")
    classifier_dropout: float = opt(0.0, "dropout before every classifier")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Binary cross-entropy per label, summed over heads."""

    pos_weight: Literal["auto", "none"] | tuple[float, ...] = opt(
        "auto", "weight of positives per label: negatives / positives of the training images, none, or numbers"
    )
    instance_weight: float = opt(0.0, "weight of the auxiliary loss on the top instances; 0 is off")
    composite_weight: float = opt(
        0.0, "weight of the auxiliary loss on composite instances, each channel's mean over its own top; 0 is off"
    )
    top_fractions: tuple[float, ...] = opt((0.005, 0.02), "shares of instances that are the top of these two losses")
    uniform_attention_share: float = opt(0.0, "share of steps with uniform attention mixed in, 1 -> 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the learning rate is a pure function of the step: linear warm-up, then cosine to 0."""

    lr: float = opt(5e-5, "learning rate of everything but the backbone")
    backbone_lr_factor: float = opt(0.1, "the backbone's learning rate is lr times this")
    weight_decay: float = opt(1e-4, "decoupled weight decay; norms and biases have none")
    beta1: float = opt(0.9, "AdamW's first beta")
    beta2: float = opt(0.999, "AdamW's second beta")
    warmup_epochs: float = opt(1.0, "epochs of linear warm-up")
    clip_grad_norm: float = opt(0.0, "largest norm of the gradient; 0 is off")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training runs."""

    epochs: int = opt(30, "passes over the training images")
    batch_size: int = opt(8, "images of one optimizer step, over all ranks and accumulation steps")
    accumulation: int = opt(1, "micro-steps of one optimizer step")
    engine: Literal["ddp", "deepspeed"] = opt("ddp", "what synchronises the ranks")
    zero_stage: Literal[0, 1, 2, 3] = opt(
        2, "engine: deepspeed: what is divided among the ranks: nothing, moments, gradients too, weights too"
    )
    offload_optimizer: bool = opt(False, "engine: deepspeed: moments and the update are kept on the CPU (stages 1-3)")
    precision: Literal["fp32", "bf16", "fp16"] = opt(
        "bf16", "autocast type over fp32 parameters; fp16 needs a GPU; fp32 computes without TF32"
    )
    encoder: Literal["finetune", "frozen"] = opt("finetune", "train the backbone, or keep it in eval mode")
    head_warmup_epochs: int = opt(0, "epochs at the start in which the backbone is frozen")
    trainable_blocks: Literal["all"] | int = opt("all", "how many of the backbone's last blocks train")
    batch_norm: Literal["frozen", "train", "sync"] = opt(
        "frozen", "backbone statistics: kept, moved per rank and averaged each step, or synchronised (GPUs)"
    )
    gradient_checkpointing: bool = opt(False, "recompute the backbone's activations: less memory, more time")
    channels_last: bool = opt(True, "memory format of convolutions; under deepspeed weights are contiguous")
    compile: bool = opt(False, "torch.compile the model")
    timeout_s: int = opt(1800, "seconds that ranks wait for one that does not answer before all end (exit code 75)")
    ema_decay: float = opt(0.0, "decay of the averaged weights that are evaluated and exported; 0 is off")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved; the best step and the end are always kept."""

    every_steps: int = opt(0, "save every N steps, beside the end of each epoch; 0: no others")
    every_minutes: float = opt(0.0, "save when this many minutes have passed since the last save; 0: by steps alone")
    keep_last: int = opt(2, "newest checkpoints to keep")
    keep_best: int = opt(1, "best checkpoints by the validation metric to keep, beside the newest")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation while training, and what `msmil evaluate` computes."""

    every_epochs: int = opt(1, "validate after every N epochs, and after the last")
    batch_size: int = opt(8, "images per rank and step")
    bootstrap_replicates: int = opt(1000, "patient-clustered bootstrap replicates of each interval")
    confidence: float = opt(0.95, "coverage of the intervals")
    gallery: int = opt(4, "pictures of hits, of misses and of false alarms per label; 0: no pictures of images")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is logged while it trains."""

    every_steps: int = opt(10, "write TensorBoard scalars every N steps")
    images: int = opt(8, "validation images whose maps TensorBoard shows, the same after every validation; 0: none")


@dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment. Its run folder is output_dir/name."""

    name: str = opt("run", "name of the run folder")
    output_dir: str = opt("runs", "where run folders lie")
    seed: int = opt(10, "seed of weights, order, augmentation and dropout")
    data: DataConfig = opt(DataConfig, "images and labels")
    bags: BagConfig = opt(BagConfig, "image -> instances")
    model: ModelConfig = opt(ModelConfig, "the network")
    loss: LossConfig = opt(LossConfig, "what is minimised")
    optim: OptimConfig = opt(OptimConfig, "the optimizer")
    train: TrainConfig = opt(TrainConfig, "the run")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "saving")
    evaluate: EvaluateConfig = opt(EvaluateConfig, "metrics")
    tracking: TrackingConfig = opt(TrackingConfig, "logging")

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Config) -> None:
    """Refuse what types cannot tell: ranges and settings that exclude each other."""
    check_ranges(config)
    train, data = config.train, config.data
    check_folds(config.data)
    check_order(config.data)
    for key in ("shards", "features"):
        check_url(getattr(data, key), f"data.{key}")
    _require(not is_url(config.output_dir), "output_dir", config.output_dir, "give a folder: runs are written here")
    check_model(config)
    _require(len(data.labels) > 0, "data.labels", list(data.labels), "name at least one label of the manifest")
    _require(len(set(data.labels)) == len(data.labels), "data.labels", list(data.labels), "name each label once")
    if isinstance(config.loss.pos_weight, tuple):
        weights = config.loss.pos_weight
        fix = f"give one positive number for each of the labels {list(data.labels)}"
        _require(
            len(weights) == len(data.labels) and all(w > 0 for w in weights), "loss.pos_weight", list(weights), fix
        )
    if train.gradient_checkpointing:
        fix = "set train.batch_norm: frozen, since recomputed activations would move the statistics twice"
        _require(train.batch_norm == "frozen", "train.batch_norm (with gradient_checkpointing)", train.batch_norm, fix)
    if train.batch_norm != "frozen":
        fix = "set data.last_batch: drop or wrap, since the repeated images of a padded batch would move the statistics"
        key = "data.last_batch (where statistics move)"
        _require(data.last_batch != "pad", key, data.last_batch, fix)
        fix = "set data.on_error: stop, since the black image in place of a skipped one would move the statistics"
        _require(data.on_error == "stop", "data.on_error (where statistics move)", data.on_error, fix)
    fix = "the warm-up must not outlast the run"
    _require(config.optim.warmup_epochs <= train.epochs, "optim.warmup_epochs", config.optim.warmup_epochs, fix)
    check_frozen(train)
    if data.features:
        check_offline(config)
    check_engine(train)
    fix = "the head-only stage must end before the run does"
    _require(train.head_warmup_epochs < train.epochs, "train.head_warmup_epochs", train.head_warmup_epochs, fix)
