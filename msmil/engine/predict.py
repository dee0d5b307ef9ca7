"""Inference over exact spans: every image once, on any number of ranks.

B bags, S scales, K labels, M images of this rank, N images of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from msmil.engine.losses import BagLoss, LossParts
from msmil.engine.memory import evaluation_out_of_memory, explained
from msmil.engine.pipeline import Pipeline, known_labels, to_device
from msmil.types import Bag, BagOutput, Prediction
from shards.errors import UserError
from shards.plan import evaluation_span
from shards.progress import progress
from shards.stream import blank_batch, evaluation_stream
from shards.types import Batch


@dataclass(frozen=True)
class _Part:
    """What one rank predicted, for the rows that the batches held."""

    row_M: np.ndarray
    probability_MK: np.ndarray
    scale_probability_MSK: np.ndarray | None
    scale_weight_MKS: np.ndarray | None
    losses: dict[str, float]


def predict(pipeline: Pipeline, module: nn.Module, scales: tuple[int, ...], rows_N: np.ndarray) -> list[Prediction]:
    """Predictions of these rows of the manifest, in their order, on all ranks.

    Raises:
        UserError: a probability is not finite; the image is named.
    """
    return _predict(pipeline, module, scales, rows_N, None)[0]


def predict_with_losses(
    pipeline: Pipeline,
    module: nn.Module,
    scales: tuple[int, ...],
    rows_N: np.ndarray,
    loss: BagLoss,
    *,
    together: Callable[..., BagOutput] | None = None,
) -> tuple[list[Prediction], dict[str, float]]:
    """`predict`, and the loss of training with its parts over all of these rows, by name.

    As in training it is a sum over known labels, divided by rows x labels. Not in it: the padding and the augmentation
    of training, and its uniform attention (loss.uniform_attention_share).

    `together` is called in place of a module whose weights are divided among the ranks. All ranks have to call it
    equally often: those with fewer batches fill up with blank ones, which count for nothing.
    """
    return _predict(pipeline, module, scales, rows_N, loss, together)


def _predict(
    pipeline: Pipeline,
    module: nn.Module,
    scales: tuple[int, ...],
    rows_N: np.ndarray,
    loss: BagLoss | None,
    together: Callable[..., BagOutput] | None = None,
) -> tuple[list[Prediction], dict[str, float]]:
    assert len(np.unique(rows_N)) == len(rows_N), "an image is asked for once"
    parts: list[_Part] = pipeline.runtime.gather(_predict_span(pipeline, module, rows_N, loss, together))
    row_N = np.concatenate([part.row_M for part in parts])
    assert np.array_equal(row_N, rows_N), "every image is predicted exactly once"
    losses: dict[str, float] = {}
    for part in parts:
        _add(losses, part.losses)
    return _as_predictions(pipeline, scales, parts), losses


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def forward_batches(
    pipeline: Pipeline, module: nn.Module, rows_M: np.ndarray, *, instance_logits: bool, what: str | None
) -> Iterator[tuple[Batch, Bag, BagOutput]]:
    """Run the module in eval mode over these rows; the batch stays on the host, bag and output are on the device.

    The batch holds images whether or not the module is called on stored features. `what` names the progress that is
    shown; None shows none.
    """
    asks = {"instance_logits": instance_logits}
    for batch, bag, output in _forward(pipeline, module, rows_M, images=True, asks=asks, what=what):
        assert bag is not None
        yield batch, bag, output


def _forward(
    pipeline: Pipeline,
    module: nn.Module,
    rows_M: np.ndarray,
    *,
    images: bool,
    asks: Mapping[str, Any],
    what: str | None,
    together: Callable[..., BagOutput] | None = None,
    blank: int = 0,
) -> Iterator[tuple[Batch, Bag | None, BagOutput]]:
    """`forward_batches`; behind them `blank` batches are forwarded whose outputs nobody gets."""
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
        node_ranks=runtime.node_ranks,
    )
    with (
        eval_mode(module),
        # weights that are gathered in here may stay for the next backward, which takes no inference tensors
        torch.inference_mode() if together is None else torch.no_grad(),
        progress(len(rows_M), what or "", "images", quiet=what is None or runtime.quiet or not runtime.is_main) as bar,
    ):
        for batch in stream:
            bag, output = _forward_batch(pipeline, batch, module, asks, together)
            yield batch, bag, output
            bar.update(len(batch.sample_B))
        for _ in range(blank):
            batch = blank_batch(pipeline.manifest, 1, labels=len(pipeline.labels), features=pipeline.features)
            _forward_batch(pipeline, batch, module, asks, together)


def _forward_batch(
    pipeline: Pipeline,
    batch: Batch,
    module: nn.Module,
    asks: Mapping[str, Any],
    together: Callable[..., BagOutput] | None,
) -> tuple[Bag | None, BagOutput]:
    config, runtime = pipeline.config, pipeline.runtime
    with explained(lambda _: evaluation_out_of_memory(config, device=runtime.device)):
        bag = pipeline.bag(batch, epoch=None)
        model_input = pipeline.model_input(batch, bag)
        if together is not None:  # it knows the precision
            with runtime.waiting():
                return bag, together(**model_input, **asks)
        with runtime.autocast():
            return bag, module(**model_input, **asks)


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


def _predict_span(
    pipeline: Pipeline,
    module: nn.Module,
    rows_N: np.ndarray,
    loss: BagLoss | None,
    together: Callable[..., BagOutput] | None,
) -> _Part:
    span = evaluation_span(len(rows_N), pipeline.runtime.world, pipeline.runtime.rank)
    rows_M = rows_N[span.start : span.stop]
    blank = 0 if together is None else _missing_batches(pipeline, len(rows_N))
    row_M = [np.empty(0, np.int64)]
    probability, scale_probability, scale_weight = [], [], []
    losses: dict[str, float] = {}
    images, asks = pipeline.features is None, {} if loss is None else loss.asks
    for batch, _, output in _forward(
        pipeline, module, rows_M, images=images, asks=asks, what="predicting", together=together, blank=blank
    ):
        if loss is not None:
            _add(losses, _losses(pipeline, loss, batch, output, len(rows_N)))
        row_M.append(batch.sample_B.numpy())
        probability.append(output.logit_BK.float().sigmoid().cpu().numpy())
        if output.scale_logit_SBK is not None:
            scale_probability.append(output.scale_logit_SBK.float().sigmoid().transpose(0, 1).cpu().numpy())
        if output.scale_weight_BKS is not None:
            scale_weight.append(output.scale_weight_BKS.float().cpu().numpy())
    return _Part(
        row_M=np.concatenate(row_M),
        probability_MK=np.concatenate(probability) if probability else np.zeros((0, len(pipeline.labels)), np.float32),
        scale_probability_MSK=np.concatenate(scale_probability) if scale_probability else None,
        scale_weight_MKS=np.concatenate(scale_weight) if scale_weight else None,
        losses=losses,
    )


def _missing_batches(pipeline: Pipeline, images: int) -> int:
    """How many batches more than this rank some rank has, in an evaluation of so many images."""
    size, world = pipeline.config.evaluate.batch_size, pipeline.runtime.world
    batches_W = [-(-len(evaluation_span(images, world, rank)) // size) for rank in range(world)]
    return max(batches_W) - batches_W[pipeline.runtime.rank]


def _losses(pipeline: Pipeline, loss: BagLoss, batch: Batch, output: BagOutput, images: int) -> dict[str, float]:
    """The batch's share in the losses of all `images`, from one copy to the host."""
    label_BK, weight_B = (to_device(x, pipeline.runtime.device) for x in (batch.label_BK, batch.weight_B))
    parts: LossParts = loss(output, label_BK, weight_B, global_count=images * len(pipeline.labels))
    named = parts.named(pipeline.labels)
    return dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))


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
