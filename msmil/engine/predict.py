"""Inference over exact spans: every image once, on any number of ranks.

B bags, S scales, K labels, M images of this rank, N images of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from msmil.engine.pipeline import Pipeline, known_labels
from msmil.types import Bag, BagOutput, Prediction
from shards.errors import UserError
from shards.plan import evaluation_span
from shards.progress import progress
from shards.stream import evaluation_stream
from shards.types import Batch


@dataclass(frozen=True)
class _Part:
    """What one rank predicted."""

    row_M: np.ndarray
    probability_MK: np.ndarray
    scale_probability_MSK: np.ndarray | None
    scale_weight_MKS: np.ndarray | None


def predict(pipeline: Pipeline, module: nn.Module, scales: tuple[int, ...], rows_N: np.ndarray) -> list[Prediction]:
    """Predictions of these rows of the manifest, in their order, on all ranks.

    Raises:
        UserError: a probability is not finite; the image is named.
    """
    parts: list[_Part] = pipeline.runtime.gather(_predict_span(pipeline, module, rows_N))
    row_N = np.concatenate([part.row_M for part in parts])
    assert np.array_equal(row_N, rows_N), "every image is predicted exactly once"
    return _as_predictions(pipeline, scales, parts)


def forward_batches(
    pipeline: Pipeline, module: nn.Module, rows_M: np.ndarray, *, instance_logits: bool, what: str
) -> Iterator[tuple[Batch, Bag, BagOutput]]:
    """Run the module in eval mode over these rows; the batch stays on the host, bag and output are on the device.

    The batch holds images whether or not the module is called on stored features.
    """
    for batch, bag, output in _forward(
        pipeline, module, rows_M, images=True, instance_logits=instance_logits, what=what
    ):
        assert bag is not None
        yield batch, bag, output


def _forward(
    pipeline: Pipeline, module: nn.Module, rows_M: np.ndarray, *, images: bool, instance_logits: bool, what: str
) -> Iterator[tuple[Batch, Bag | None, BagOutput]]:
    config, runtime = pipeline.config, pipeline.runtime
    stream = evaluation_stream(
        pipeline.manifest,
        labels=pipeline.labels,
        rows=rows_M,
        batch_size=config.evaluate.batch_size,
        workers=config.data.workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=runtime.device.type == "cuda",
        features=pipeline.features,
        images=images,
    )
    with (
        eval_mode(module),
        torch.inference_mode(),
        progress(len(rows_M), what, "images", quiet=runtime.quiet or not runtime.is_main) as bar,
    ):
        for batch in stream:
            bag = pipeline.bag(batch, epoch=None)
            with runtime.autocast():
                output: BagOutput = module(**pipeline.model_input(batch, bag), instance_logits=instance_logits)
            yield batch, bag, output
            bar.update(len(batch.sample_B))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and the modes that were there before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _predict_span(pipeline: Pipeline, module: nn.Module, rows_N: np.ndarray) -> _Part:
    span = evaluation_span(len(rows_N), pipeline.runtime.world, pipeline.runtime.rank)
    rows_M = rows_N[span.start : span.stop]
    probability, scale_probability, scale_weight = [], [], []
    images = pipeline.features is None
    for _, _, output in _forward(pipeline, module, rows_M, images=images, instance_logits=False, what="predicting"):
        probability.append(output.logit_BK.float().sigmoid().cpu().numpy())
        if output.scale_logit_SBK is not None:
            scale_probability.append(output.scale_logit_SBK.float().sigmoid().transpose(0, 1).cpu().numpy())
        if output.scale_weight_BKS is not None:
            scale_weight.append(output.scale_weight_BKS.float().cpu().numpy())
    return _Part(
        row_M=rows_M,
        probability_MK=np.concatenate(probability) if probability else np.zeros((0, len(pipeline.labels)), np.float32),
        scale_probability_MSK=np.concatenate(scale_probability) if scale_probability else None,
        scale_weight_MKS=np.concatenate(scale_weight) if scale_weight else None,
    )


def _as_predictions(pipeline: Pipeline, scales: tuple[int, ...], parts: list[_Part]) -> list[Prediction]:
    manifest, labels = pipeline.manifest, pipeline.labels
    predictions: list[Prediction] = []
    for part in parts:
        names = [manifest.text(column, part.row_M) for column in ("image_id", "exam_id", "patient_id")]
        target_MK = known_labels(manifest, part.row_M, labels)
        for m, (image_id, exam_id, patient_id) in enumerate(zip(*names, strict=True)):
            if not np.isfinite(part.probability_MK[m]).all():
                fix = "look at this image; train longer, with a lower optim.lr, or in fp32"
                raise UserError(f"the model gives no finite probability for image {image_id}", fix=fix)
            side, weight = part.scale_probability_MSK, part.scale_weight_MKS
            pairs = [(s, scale, k, label) for s, scale in enumerate(scales) for k, label in enumerate(labels)]
            predictions.append(
                Prediction(
                    image_id=image_id,
                    exam_id=exam_id,
                    patient_id=patient_id,
                    target={label: int(target_MK[m, k]) for k, label in enumerate(labels)},
                    probability={label: float(part.probability_MK[m, k]) for k, label in enumerate(labels)},
                    scale_probability={}
                    if side is None
                    else {(scale, label): float(side[m, s, k]) for s, scale, k, label in pairs},
                    scale_weight={}
                    if weight is None
                    else {(scale, label): float(weight[m, k, s]) for s, scale, k, label in pairs},
                )
            )
    return predictions
