"""What a trained run is worth: predictions, metrics with intervals, and where it looks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msmil.config import Config
from msmil.detection.breast import breast_masks
from msmil.detection.heatmap import map_names, maps
from msmil.detection.localisation import PeakHits
from msmil.engine.checkpoint import Checkpoint, load_checkpoint
from msmil.engine.checkpoint_state import COPY_AGAIN, cut_off, newest, pointed
from msmil.engine.data import check_trained_on
from msmil.engine.data_summary import describe_data
from msmil.engine.pictures import Showing, write_pictures
from msmil.engine.pipeline import Pipeline, build_network, open_pipeline, with_encoder_of
from msmil.engine.predict import forward_batches, predict
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.engine.tracking import log, open_log
from msmil.evaluation.predictions import write_atomically, write_predictions
from msmil.evaluation.results import classification_results
from msmil.models.centres import CellOffsets, cell_centres
from msmil.models.mil import MILModel
from msmil.models.weights import WEIGHTS_FILE, load_weights
from msmil.reporting.figures import classification_figures, save
from msmil.types import Prediction
from shards.errors import UserError
from shards.plan import evaluation_span
from shards.types import Split


@dataclass(frozen=True)
class Evaluation:
    """A trained network on its data, in this process."""

    pipeline: Pipeline
    folder: RunFolder
    network: MILModel


def evaluate(
    config: Config, folder: RunFolder, runtime: Runtime, *, split: Split, checkpoint: str, other_data: bool = False
) -> dict[str, Any]:
    """Evaluate a run on a split, write its files, and return the results.

    Writes predictions/{val,split}.csv, figures/<split>_*.png, gallery/<split>/ and, when those are whole,
    metrics/<split>.json into the run folder. The results of another split than val hold those of val, of the same
    weights, as "validation".

    Args:
        config: the run's, perhaps with another data.shards.
        checkpoint: `best`, `latest`, or the name of a folder such as step_00000880.
        other_data: data.shards is on purpose not what the run was trained on; thresholds then come from the
            validation split of these other data.

    Raises:
        UserError: no checkpoint, other data, no images in the split; a probability that is not finite.
    """
    open_log(folder.log if runtime.is_main else None, quiet=runtime.quiet)
    found = find_checkpoint(folder, checkpoint, other_data=other_data)
    evaluation = open_evaluation(config, folder, runtime, found, other_data=other_data)
    if evaluation.pipeline.manifest.remote is not None:
        log.info("images: %s", evaluation.pipeline.manifest.remote)
    pipeline, scales = evaluation.pipeline, evaluation.network.scales
    predictions: dict[str, list[Prediction]] = {
        name: _predict(evaluation, name) for name in dict.fromkeys(("val", split))
    }
    results = classification_results(
        predictions[split],
        predictions["val"],
        pipeline.labels,
        scales,
        replicates=config.evaluate.bootstrap_replicates,
        confidence=config.evaluate.confidence,
        seed=config.seed,
    )
    results["split"] = split
    results["checkpoint"] = found.name
    if split != "val":
        results["validation"] = validation_results(evaluation, predictions["val"])
    results["thresholds_from"]["split"] = "val"
    results["data_fingerprint"] = pipeline.manifest.fingerprint
    results["data"] = describe_data(pipeline.manifest, pipeline.labels)
    results["other_data_than_trained_on"] = other_data
    offsets = cell_centres(evaluation.network, evaluation.pipeline.tile_hw)
    results["localisation"] = localise(evaluation, split, offsets) if _has_maps(evaluation.network) else None
    runtime.on_main(lambda: _write(evaluation, split, predictions, results, offsets))
    return results


def validation_results(evaluation: Evaluation, predictions: list[Prediction]) -> dict[str, Any]:
    """The validation metrics, per label and their mean, without intervals."""
    config = evaluation.pipeline.config
    found = classification_results(
        predictions,
        predictions,
        config.data.labels,
        evaluation.network.scales,
        replicates=0,
        confidence=config.evaluate.confidence,
        seed=config.seed,
    )
    return {key: found[key] for key in ("labels", "mean_auroc", "images", "patients")}


def find_checkpoint(folder: RunFolder, name: str, *, other_data: bool) -> Path:
    """The folder of a checkpoint by name; `best` is the latest where no validation metric was defined.

    A folder of `msmil convert` or `msmil export` has no checkpoints: it is one itself, for data that the user names.
    """
    root = folder.checkpoints
    if not root.exists() and (folder.root / WEIGHTS_FILE).exists():
        if not other_data:
            fix = "name the data to judge them on with --shards"
            raise UserError("holds weights alone, and no data of their own", file=folder.root, fix=fix)
        return folder.root
    folder.mend()
    found = pointed(root, name) if name in ("best", "latest") else root / name
    never = not (root / name).exists()
    if found is None and name == "best" and never and (found := newest(root)) is not None:
        log.warning("no step was the best (no validation metric was defined): the newest checkpoint is evaluated")
    if found is None or not found.is_dir():
        known = ", ".join(["best", "latest", *sorted(path.name for path in root.glob("step_*"))])
        raise UserError(
            f"there is no checkpoint {name!r}", file=folder.root, fix=f"train first, or choose from {known}"
        )
    if reason := cut_off(found):
        before = newest(root)
        if name != "latest" or before is None:
            raise UserError(f"the checkpoint is cut off ({reason})", file=found, fix=f"{COPY_AGAIN}, or name another")
        log.warning("%s is cut off (%s): the one before it is used, %s", found, reason, before.name)
        return before
    return found


def open_evaluation(
    config: Config, folder: RunFolder, runtime: Runtime, checkpoint: Path, *, other_data: bool
) -> Evaluation:
    """The network with a checkpoint's weights (the averaged ones, where it has them) on its data."""
    pipeline = open_pipeline(config, runtime)
    network = build_network(config, pipeline.image_hw, pretrained=False)
    if checkpoint == folder.root:
        return _open_converted(pipeline, folder, network)
    saved = load_checkpoint(checkpoint)
    if not other_data:
        check_trained_on(checkpoint, saved.state, pipeline.manifest)
    fill(network, evaluated_weights(saved), pipeline.image_hw, checkpoint)
    log.info("evaluating %s (epoch %d, step %d)", checkpoint, saved.state.epoch, saved.state.step)
    return Evaluation(with_encoder_of(pipeline, network), folder, network.to(runtime.device))


def _open_converted(pipeline: Pipeline, folder: RunFolder, network: MILModel) -> Evaluation:
    """Weights alone: which data they were trained on does not matter here."""
    model = replace(pipeline.config.model, weights=str(folder.root), pretrained=False)
    weights = load_weights(model, network)
    if weights.encoder_alone:
        fix = "train from it (model.weights), and evaluate the run"
        raise UserError("holds an encoder alone, which judges nothing", file=folder.root, fix=fix)
    log.info("evaluating weights alone: %s", weights.file)
    return Evaluation(pipeline, folder, network.to(pipeline.runtime.device))


def evaluated_weights(saved: Checkpoint) -> dict[str, Any]:
    """The weights to use: the averaged ones where there are any."""
    if saved.ema is None:
        return saved.model
    prefix = "module."  # of torch's AveragedModel
    return {key.removeprefix(prefix): value for key, value in saved.ema.items() if key.startswith(prefix)}


def fill(network: MILModel, weights: dict[str, Any], image_hw: tuple[int, int], source: Path) -> None:
    """Load weights into the network that was built for images of this size.

    Raises:
        UserError: they do not fit it.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        fix = "give shards of the image size it was trained on (inducing points and strides depend on it)"
        first = " ".join(str(error).split())[:300]
        raise UserError(f"does not fit images of {image_hw}: {first}", file=source, fix=fix) from None


def _predict(evaluation: Evaluation, split: str) -> list[Prediction]:
    rows = evaluation.pipeline.manifest.rows(split)
    if len(rows) == 0:
        fix = "choose another split, or pack again with images in it"
        raise UserError(f"split {split} has no images", file=evaluation.pipeline.manifest.place, fix=fix)
    return predict(evaluation.pipeline, evaluation.network, evaluation.network.scales, rows)


def _has_maps(network: MILModel) -> bool:
    """Whether a network says where it looks; if not, the log says so."""
    if network.has_attention or network.judges_instances:
        return True
    log.warning("this model has no maps (no attention, no head that judges instances): nothing is located")
    return False


def localise(evaluation: Evaluation, split: str, offsets: CellOffsets) -> dict[str, Any]:
    """How often the peak of each map lies in a box, over the split's images that have one."""
    pipeline, network = evaluation.pipeline, evaluation.network
    manifest, runtime = pipeline.manifest, pipeline.runtime
    rows_N = rows_with_boxes(pipeline, split)
    span = evaluation_span(len(rows_N), runtime.world, runtime.rank)
    rows_M = rows_N[span.start : span.stop]
    instance = network.judges_instances
    names = map_names(network.scales, attention=network.has_attention, instance=instance)
    hits = PeakHits(pipeline.labels, names)
    for batch, bag, output in forward_batches(pipeline, network, rows_M, instance_logits=instance, what="locating"):
        assert batch.image_B1HW is not None
        breast_BHW = breast_masks(batch.image_B1HW).to(runtime.device)
        boxes = [manifest.record(int(row)).boxes for row in batch.sample_B]
        hits.add(maps(output, bag, breast_BHW, offsets).named(), breast_BHW, boxes)
    hits.count_KM3 = np.sum(runtime.gather(hits.count_KM3), axis=0)
    return hits.results()


def rows_with_boxes(pipeline: Pipeline, split: str) -> np.ndarray:
    """Rows of a split with a box of a label that is learned."""
    manifest = pipeline.manifest
    known = set(pipeline.labels)
    rows = [int(r) for r in manifest.rows(split) if any(box.label in known for box in manifest.record(int(r)).boxes)]
    return np.array(rows, np.int64)


def _write(
    evaluation: Evaluation,
    split: str,
    predictions: dict[str, list[Prediction]],
    results: dict[str, Any],
    offsets: CellOffsets,
) -> None:
    folder, pipeline = evaluation.folder, evaluation.pipeline
    for part in (folder.predictions, folder.metrics, folder.figures):
        part.mkdir(parents=True, exist_ok=True)
    for name, rows in predictions.items():
        write_predictions(folder.predictions / f"{name}.csv", rows, pipeline.labels, evaluation.network.scales)
    settings = pipeline.config.evaluate
    figures = classification_figures(
        predictions[split],
        results,
        replicates=settings.bootstrap_replicates,
        confidence=settings.confidence,
        seed=pipeline.config.seed,
    )
    for name, figure in figures.items():
        save(figure, folder.figures / f"{split}_{name}.png")
    showing = Showing(pipeline, evaluation.network, offsets, split, predictions[split])
    write_pictures(showing, results, per_kind=settings.gallery, gallery=folder.gallery, figures=folder.figures)
    text = json.dumps(results, indent=2, allow_nan=False)
    write_atomically(folder.metrics / f"{split}.json", text.encode("utf-8"))
    log.info("metrics, predictions, figures and gallery are in %s", folder.root)
