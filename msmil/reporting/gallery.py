"""The gallery of a run: pictures of its most telling images, chosen per label, in `gallery/<split>/`.

index.json tells what each picture is. It holds image, exam and patient ids, as the table of predictions does; names of
files and the pictures themselves hold none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image

from msmil.evaluation.predictions import write_atomically
from msmil.reporting.figures.maps import MapRow, panel, reduced
from msmil.types import Prediction
from shards.errors import UserError
from shards.files import atomic_folder

KINDS: Final = ("hit", "miss", "false_alarm")
INDEX_NAME: Final = "index.json"
VERSION: Final = 1
IMAGE_PX, MAP_PX = 640, 320  # longest side of the image with its overlay, and of the maps
_JPEG_QUALITY: Final = 85


@dataclass(frozen=True, slots=True)
class Choice:
    """An image chosen for a label: a place in the table of predictions (from 1 on), and what it is there for."""

    kind: str
    number: int
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Case:
    """A choice with its pictures.

    row: the image with its boxes (of any label) and maps, reduced to IMAGE_PX; ranges: lowest and highest value of each
    map inside the breast, before it was reduced; peak_in_box: whether the merged map's peak lies in a box of the label,
    None without map or box; view: side and view, such as "R MLO".
    """

    label: str
    choice: Choice
    row: MapRow
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    peak_in_box: bool | None = None
    view: str = ""


def choose(
    predictions: Sequence[Prediction], label: str, threshold: float | None, per_kind: int
) -> tuple[list[Choice], dict[str, int]]:
    """The most telling images of a label, and how many there are of each kind.

    Hits are positives called positive, the most probable first; misses positives called negative, the least probable
    first; false alarms negatives called positive, the most probable first. Without a threshold nothing is called:
    positives in the upper half of their order then stand for hits, the others for misses, all negatives for false
    alarms. Ties go by the order of the table.
    """
    numbered = [(number, p) for number, p in enumerate(predictions, start=1)]
    positive = sorted((n_p for n_p in numbered if n_p[1].target[label] == 1), key=_by_probability(label))
    negative = sorted((n_p for n_p in numbered if n_p[1].target[label] == 0), key=_by_probability(label))
    if threshold is None:
        called, alarms = -(-len(positive) // 2), len(negative)
    else:
        called, alarms = (sum(p.probability[label] >= threshold for _, p in part) for part in (positive, negative))
    of_kind = {"hit": positive[:called], "miss": positive[called:][::-1], "false_alarm": negative[:alarms]}
    chosen = [Choice(kind, number, p) for kind in KINDS for number, p in of_kind[kind][:per_kind]]
    return chosen, {kind: len(of_kind[kind]) for kind in KINDS}


def _by_probability(label: str) -> Any:
    return lambda numbered: (-numbered[1].probability[label], numbered[0])


class GalleryWriter:
    """Collects cases in a folder that `writing_gallery` moves to its place."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._index: dict[str, Any] = {"version": VERSION, **about, "labels": {}, "cases": []}

    def label(self, label: str, *, threshold: float | None, counts: Mapping[str, int]) -> None:
        """A label's operating point, and how many images of each kind the split has."""
        self._index["labels"][label] = {"threshold": threshold, "counts": dict(counts)}

    def add(self, case: Case) -> None:
        """Write the pictures of a case."""
        cases, p = self._index["cases"], case.choice.prediction
        small = reduced(case.row, MAP_PX)
        first = next(iter(case.row.maps), None)
        pictures = []
        for name in (None, *case.row.maps):
            file = f"{len(cases) + 1:04d}_{name or 'image'}.jpg"
            large = name is None or name == first
            write_atomically(self._folder / file, _jpeg(panel(case.row if large else small, name, case.label)))
            pictures.append({"name": name or "image", "file": file, "range": case.ranges.get(name or "")})
        cases.append(
            {
                "label": case.label,
                "kind": case.choice.kind,
                "number": case.choice.number,
                "image_id": p.image_id,
                "exam_id": p.exam_id,
                "patient_id": p.patient_id,
                "view": case.view,
                "probability": p.probability[case.label],
                "positive_for": [name for name, target in p.target.items() if target == 1],
                "boxes": sum(box.label == case.label for box in case.row.boxes),
                "peak_in_box": case.peak_in_box,
                "pictures": pictures,
            }
        )

    def close(self) -> None:
        """Write the index, last: a gallery without one is not whole."""
        text = json.dumps(self._index, indent=1, allow_nan=False)
        write_atomically(self._folder / INDEX_NAME, text.encode("utf-8"))


@contextmanager
def writing_gallery(folder: Path, about: Mapping[str, Any]) -> Iterator[GalleryWriter]:
    """Write a gallery beside its place, and put it there when it is whole; the one before stays until then.

    Args:
        folder: gallery/<split> of a run.
        about: what index.json says at its top: split, checkpoint, data_fingerprint.

    Raises UserError where it cannot be written.
    """
    try:
        with atomic_folder(folder) as temporary:
            writer = GalleryWriter(temporary, about)
            yield writer
            writer.close()
    except OSError as error:
        fix = "make room or choose a folder that can be written to, and run the command again"
        raise UserError(f"the gallery cannot be written ({error.strerror})", fix=fix, file=folder) from error


@dataclass(frozen=True)
class Gallery:
    """A gallery as it was found: its index, and where its pictures lie."""

    folder: Path
    index: dict[str, Any]

    def picture(self, name: object) -> bytes | None:
        """The bytes of a picture that the index names; None where it is gone, broken, or outside of this folder."""
        path = self.folder / Path(str(name)).name
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=("jpeg",)) as picture:
                picture.verify()
        except (OSError, SyntaxError):  # what Pillow raises for a broken file
            return None
        return data


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery of a folder, None where there is none, or none that this version can read."""
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(index, dict) or index.get("version") != VERSION:
        return None
    return Gallery(folder, index)


def _jpeg(picture_HW3: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture_HW3).save(data, format="jpeg", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return data.getvalue()
