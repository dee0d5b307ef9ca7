"""What TensorBoard shows beside the scalars of a step: options, charts, curves, histograms, images. Rank 0 only.

N validation images, M fixed ones, T thresholds.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.pr_curve import metadata as pr_curves
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import summary

from msmil.config import Config
from msmil.config_io import config_to_dict
from msmil.engine.run_folder import MOVES_NOTHING
from msmil.engine.tracking import PHASES
from msmil.evaluation.results import columns
from msmil.models.mil import MILModel
from msmil.types import Prediction

if TYPE_CHECKING:
    from msmil.engine.run import Run

MOST_RANKS: Final = 16  # of more, only the slowest is named
_THRESHOLDS: Final = 501  # of a precision-recall curve; TensorBoard takes them as evenly spread over 0..1
_BINS: Final = np.linspace(0, 1, 31)


def start_of_run(run: Run) -> list[Summary]:
    """The options that tell this run from others, and the layout of the dashboard Custom Scalars."""
    config, fingerprint = run.pipeline.config, run.pipeline.manifest.fingerprint
    info = SessionStartInfo(start_time_secs=time.time())
    for key, value in comparable_options(config, fingerprint).items():
        if isinstance(value, bool):  # before numbers: a bool is one
            info.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[key].number_value = value
        else:
            info.hparams[key].string_value = value
    options = _of_hparams(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))
    return [options, summary.custom_scalars(layout(run))]


def end_of_run() -> list[Summary]:
    """That the run is whole; its metrics are the last values of its scalars."""
    info = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
    return [_of_hparams(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))]


def _of_hparams(tag: str, data: HParamsPluginData) -> Summary:
    # TensorBoard's fast loader passes over a summary that has no value
    value = Summary.Value(tag=tag, metadata=hparams.create_summary_metadata(data), tensor=hparams.NULL_TENSOR)
    return Summary(value=[value])


def comparable_options(config: Config, fingerprint: str) -> dict[str, bool | float | str]:
    """Every option that moves a weight, by dotted key, and which data; lists and mappings are written as JSON.

    The others (paths, names, workers, saving, tracking) may change when a run goes on, and TensorBoard keeps the first.
    """
    options: dict[str, bool | float | str] = {}

    def add(tree: Mapping[str, Any], like: object, prefix: str) -> None:
        for name, value in tree.items():
            key, field = f"{prefix}{name}", getattr(like, name)
            if hasattr(field, "__dataclass_fields__"):
                add(value, field, f"{key}.")
            elif not key.startswith(MOVES_NOTHING):
                options[key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)

    add(config_to_dict(config), config, "")
    return options | {"data.fingerprint": fingerprint[:12]}


def layout(run: Run) -> dict[str, dict[str, list[Any]]]:
    """Charts of the dashboard Custom Scalars by group: what belongs together, on one chart."""
    config, labels, scales = run.pipeline.config, run.pipeline.labels, run.network.scales
    metrics = {
        f"{words} of {label}, all scales": _tags(f"val/{metric}/{label}", *_scale_tags(metric, label, scales))
        for metric, words in (("auroc", "AUROC"), ("average_precision", "average precision"))
        for label in labels
    }
    speed = {
        "seconds of a step": _tags(*(f"train/seconds/{phase}" for phase in (*PHASES, "step"))),
        "images per second": _tags("train/images_per_s"),
    }
    if run.pipeline.runtime.world > 1:
        speed["seconds of each rank, until it waits for the others"] = ["Multiline", [r"ranks/seconds/.*$"]]
    skips = config.data.on_error == "skip"
    data = {"data": {"skipped samples of an epoch": _tags("train/skipped_samples")}} if skips else {}
    return {
        "loss: training and validation": {
            name.replace("/", " "): _tags(f"train/loss/{name}", f"val/loss/{name}") for name in loss_names(config)
        },
        "validation: classification": {
            "AUROC": _tags("val/auroc/mean", *(f"val/auroc/{label}" for label in labels)),
            "average precision": _tags(*(f"val/average_precision/{label}" for label in labels)),
            **metrics,
        },
        "optimizer": {"learning rate": ["Multiline", [r"train/lr/.*$"]], "gradient": _tags("train/gradient_norm")},
        "speed": speed,
        **data,
    }


def _tags(*tags: str) -> list[Any]:
    """A chart of exactly these scalars; TensorBoard matches tags by the beginning of a pattern."""
    return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]


def _scale_tags(metric: str, label: str, scales: Sequence[int]) -> list[str]:
    return [f"val/{metric}/{label}/scale_{scale}" for scale in scales]


def loss_names(config: Config) -> list[str]:
    """Names of the parts of the loss (`LossParts.named`) that a configuration has."""
    model, loss = config.model, config.loss
    names = ["total", "aggregated", *(f"label/{label}" for label in config.data.labels)]
    if model.deep_supervision and model.instance_encoder != "single":
        names += [f"scale/{scale}" for scale in model.scales]
    auxiliary = {"instance": loss.instance_weight, "composite": loss.composite_weight}
    return names + [name for name, weight in auxiliary.items() if weight > 0]


def rank_scalars(own_s: Sequence[float]) -> dict[str, float]:
    """Seconds that each rank worked in a step before it waited for the others: the straggler shows."""
    if len(own_s) < 2:
        return {}
    values = {"min": min(own_s), "mean": sum(own_s) / len(own_s), "max": max(own_s)}
    if len(own_s) <= MOST_RANKS:
        values |= {f"rank_{rank}": seconds for rank, seconds in enumerate(own_s)}
    scalars = {f"ranks/seconds/{name}": value for name, value in values.items()}
    if len(own_s) > MOST_RANKS:
        scalars["ranks/slowest"] = float(own_s.index(max(own_s)))
    return scalars


def best_scalars(values: Mapping[str, float], labels: Sequence[str]) -> dict[str, float]:
    """The metrics of the best step so far, under names that sort first, so that HParams shows them first."""
    names = {"val/auroc/mean": "best/auroc"}
    for metric in ("auroc", "average_precision"):
        names |= {f"val/{metric}/{label}": f"best/{metric}/{label}" for label in labels}
    return {best: values[name] for name, best in names.items() if name in values}


def curves(predictions: Sequence[Prediction], labels: Sequence[str], scales: Sequence[int]) -> Iterator[Summary]:
    """Per label: its precision-recall curve, histograms of its probability by the truth, and of its scales' weights.

    What is undefined is absent: a curve of a label without positive or without negative images, an empty histogram.
    """
    for label in labels:
        target_N, probability_N = columns(predictions, label, None)
        if {0, 1} <= set(target_N.tolist()):
            known_N = target_N >= 0
            yield _precision_recall(f"precision_recall/{label}", target_N[known_N], probability_N[known_N])
        for truth, word in ((1, "present"), (0, "absent")):
            yield from _histogram(f"probability/{label}_{word}", probability_N[target_N == truth])
        for scale in scales:
            weights = [p.scale_weight[scale, label] for p in predictions if p.scale_weight]
            yield from _histogram(f"scale_weight/{label}_{scale}", np.array(weights))


def _precision_recall(tag: str, target_N: np.ndarray, probability_N: np.ndarray) -> Summary:
    # torch's own writes at most 127 thresholds, which are few where an early network gives all images about the same
    curve_6T = summary.compute_curve(target_N, probability_N, num_thresholds=_THRESHOLDS)
    meta = pr_curves.create_summary_metadata(display_name=tag, description="", num_thresholds=_THRESHOLDS)
    tensor = make_tensor_proto(curve_6T.astype(np.float32))
    return Summary(value=[Summary.Value(tag=tag, metadata=meta, tensor=tensor)])


def _histogram(tag: str, value_N: np.ndarray) -> Iterator[Summary]:
    if len(value_N):
        yield summary.histogram(tag, value_N, bins=_BINS)


def show_validation(
    run: Run, network: MILModel, predictions: Sequence[Prediction], values: Mapping[str, float], *, best: bool
) -> None:
    """Write a validation: its scalars, curves, histograms and images.

    Args:
        network: the one that predicted; on this rank alone where `shows_images`.
        values: the scalars.
        best: they are the best so far.
    """
    assert run.tracker is not None
    pipeline, step = run.pipeline, run.state.step
    run.tracker.scalars(dict(values) | (best_scalars(values, pipeline.labels) if best else {}), step)
    run.tracker.add(curves(predictions, pipeline.labels, network.scales), step)
    if shows_images(pipeline.config, network):
        from msmil.engine.fixed_images import choose_rows, strips  # matplotlib is slow to import

        rows_M = choose_rows(pipeline.manifest, "val", pipeline.labels, pipeline.config.tracking.images)
        for name, jpeg in strips(pipeline, network, rows_M):
            run.tracker.add([_image(f"maps/{name}", jpeg)], step)


def shows_images(config: Config, network: MILModel) -> bool:
    """Whether `show_validation` forwards images."""
    return config.tracking.images > 0 and has_maps(network)


def has_maps(network: MILModel) -> bool:
    """Whether a network says where it looks."""
    return network.has_attention or network.judges_instances


def _image(tag: str, jpeg: bytes) -> Summary:
    width_px, height_px = Image.open(io.BytesIO(jpeg)).size
    image = Summary.Image(height=height_px, width=width_px, colorspace=3, encoded_image_string=jpeg)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
