"""Broken samples: those that were skipped, and those whose loss is not finite. All ranks say and do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from msmil.engine.pipeline import Pipeline
from msmil.engine.tracking import log
from shards.errors import UserError


def settle_skipped(
    pipeline: Pipeline, texts: Sequence[str], *, skipped: int, before: int, samples_per_epoch: int
) -> None:
    """Name the samples that all ranks skip in a step, and stop where they are too many. All ranks have to call it.

    Args:
        pipeline: configuration and ranks.
        texts: what is broken in those of this rank.
        skipped: how many they are on all ranks.
        before: samples that the steps of this epoch before it have skipped.
        samples_per_epoch: of which data.max_skipped_fraction is a share.

    Raises:
        UserError: more than data.max_skipped_fraction of the epoch's samples are skipped.
    """
    if skipped == 0:
        return
    every = [text for part in pipeline.runtime.gather(list(texts)) for text in part]
    assert len(every) == skipped, "the number travels with the loss, the texts by themselves"
    for number, text in enumerate(every, before + 1):
        log.warning("skipped (%d in this epoch): %s", number, text)
    largest = pipeline.config.data.max_skipped_fraction
    if before + skipped > largest * samples_per_epoch:
        thing = f"{before + skipped} of an epoch's {samples_per_epoch} samples cannot be read, more than the share of "
        thing += f"{largest:g} that may be skipped (data.max_skipped_fraction); the last one: {every[-1]}"
        fix = f"run `msmil verify {pipeline.manifest.directory}`, then copy the folder or pack it again; or raise "
        raise UserError(thing, fix=f"{fix}data.max_skipped_fraction")


def refuse_non_finite(
    pipeline: Pipeline, what: str, rows: Sequence[Sequence[int]], share_M: Tensor | None = None
) -> NoReturn:
    """Stop because of a number that is not finite, which all ranks know; name the samples behind it.

    Args:
        pipeline: whose samples.
        what: the number in words.
        rows: of the manifest, of each of this rank's micro-steps.
        share_M: what each micro-step added to the number, where that is known: then the samples of those whose share
            is not finite are named.

    Raises:
        UserError: always.
    """
    suspects = list(rows)
    if share_M is not None:
        suspects = [part for part, is_finite in zip(rows, share_M.isfinite().tolist(), strict=True) if not is_finite]
    told = pipeline.runtime.gather((suspects, list(rows)))
    found = {row for own, _ in told for part in own for row in part}
    found = found or {row for _, own in told for part in own for row in part}  # finite shares whose sum is not
    images = ", ".join(pipeline.manifest.record(row).key for row in sorted(found))
    fix = "look at these images, lower optim.lr, set optim.clip_grad_norm, or train in fp32"
    raise UserError(f"the {what} is not finite; the batch held the samples {images}", fix=fix)
