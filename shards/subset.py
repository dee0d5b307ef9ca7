"""A share of the training patients: nested, and alike in labels.

M training rows, P patients, K labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import Manifest
from shards.samples import coded
from shards.splits import draw

_PURPOSE = "share"


def with_fraction(manifest: Manifest, *, fraction: float, seed: int, labels: Sequence[str]) -> Manifest:
    """The folder with a share of its training patients, whose images train; validation and test stay.

    The patients of a smaller share are among those of a larger one of the same seed, labels and folds. The fingerprint
    is that of the choice, so that a run of one share cannot go on with another.

    Args:
        manifest: with its fold in place.
        fraction: 0 < fraction <= 1; 1 is the folder as it is.
        seed: of the choice.
        labels: what the share is stratified by.

    Raises:
        UserError: the share is of no patient.
    """
    assert 0 < fraction <= 1
    row_M = manifest.rows("train")
    if fraction == 1 or len(row_M) == 0:
        return manifest
    _, first_P, patient_M = np.unique(
        coded(manifest.table, "patient_id")[row_M], return_index=True, return_inverse=True
    )
    label_MK = manifest.label_NK(labels, row_M)
    positive_PK = np.zeros((len(first_P), len(labels)), np.bool_)
    for k in range(len(labels)):
        positive_PK[patient_M[label_MK[:, k] == 1], k] = True
    chosen_P = patient_share(manifest.text("patient_id", row_M[first_P]), positive_PK, fraction, seed)
    if not chosen_P.any():
        thing = f"a data.fraction of {fraction:g} takes none of the {len(chosen_P)} training patients"
        raise UserError(thing, fix="give a larger one, or another data.fraction_seed", file=manifest.directory)
    chosen_M = row_M[chosen_P[patient_M]]
    rows = {"train": chosen_M, "val": manifest.rows("val"), "test": manifest.rows("test")}
    digest = hashlib.sha256(manifest.fingerprint.encode() + b"\0share\0" + chosen_M.astype("<i8").tobytes())
    return manifest.with_rows(rows, fingerprint=digest.hexdigest())


def patient_share(
    patients: Sequence[str], positive_PK: NDArray[np.bool_], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which patients [P] belong to a share: of every combination of positives a share, to within one patient.

    Inside a combination of n, patients are put in the order of a digest of seed and id; the one in place r is in every
    share larger than (r + u) / n, where u in 0 <= u < 1 is the combination's own draw.

    Args:
        patients: their ids, each once.
        positive_PK: the labels for which each is positive.
        fraction: the share.
        seed: of the choice.
    """
    kind_P = np.zeros(len(positive_PK), np.int64)
    for positive_P in positive_PK.T:  # numbers sort several times faster than rows
        _, first, kind_P = np.unique(2 * kind_P + positive_P, return_index=True, return_inverse=True)
    digest_P = np.array([_number(seed, patient) for patient in patients], np.uint64)
    order_P = np.lexsort((digest_P, kind_P))
    size = np.bincount(kind_P)
    texts = ["".join("01"[flag] for flag in combination) for combination in positive_PK[first].tolist()]
    start = np.array([_number(seed, f"\0{text}") / 2**64 for text in texts])
    kind = kind_P[order_P]
    place = np.arange(len(order_P)) - (np.cumsum(size) - size)[kind]
    chosen_P = np.zeros(len(order_P), np.bool_)
    chosen_P[order_P] = (place + start[kind]) < fraction * size[kind]
    return chosen_P


def _number(seed: int, name: str) -> int:
    return int.from_bytes(draw(seed, _PURPOSE, name)[:8], "big")
