"""What was packed, counted from the rows, and the table of it that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards import samples
from shards.files import human_bytes
from shards.header import Header
from shards.tables import aligned
from shards.types import SPLITS, UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a packed folder holds, as its manifest says; `str()` of it is the table for people."""

    directory: Path
    header: Header

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *aligned(self._rows()), *self._remarks()])

    def summary(self) -> dict[str, Any]:
        """The same for a script: manifest.json with the number and size of the shards instead of their list."""
        about = asdict(self.header)
        shards = about.pop("shards")
        about.pop("samples")
        num_bytes = sum(shard["num_bytes"] for shard in shards)
        return {"directory": str(self.directory), **about, "num_shards": len(shards), "num_bytes": num_bytes}

    def _head(self) -> list[str]:
        header = self.header
        size = human_bytes(sum(shard["num_bytes"] for shard in header.shards))
        return [
            f"{header.name} in {self.directory}: {len(header.shards)} shards, {size}",
            f"images {header.height_px} x {header.width_px} (height x width) {header.dtype}, recipe "
            f"{header.recipe['name']}, codec {header.codec}",
            f"fingerprint {header.fingerprint}",
        ]

    def _rows(self) -> list[list[str]]:
        counts = self.header.counts
        rows = [["", *SPLITS, "all"]]
        rows += [_line(what, counts[what]) for what in ("images", "exams", "patients")]
        for label in self.header.labels:
            rows.append(_line(f"{label} positive", counts["positives"][label]))
            if any(counts["unknown"][label].values()):
                rows.append(_line(f"{label} unknown", counts["unknown"][label]))
            rows.append(_line(f"{label} boxes", counts["boxes"][label]))
        return rows

    def _remarks(self) -> list[str]:
        lines = [f"mended: {count} {what}" for what, count in self.header.notes.items()]
        for dropped in self.header.dropped:
            names = ", ".join(dropped["image_ids"][:5]) + (", ..." if dropped["count"] > 5 else "")
            lines.append(f"left out: {dropped['count']} images, {dropped['reason']} ({names})")
        return ["", *lines] if lines else []


def count(table: pa.Table, labels: Sequence[str]) -> dict[str, Any]:
    """Images, exams, patients, positives, unknowns and boxes by split, from a table of samples with plain texts."""
    return count_parts({split: table.filter(pc.field("split") == split) for split in SPLITS}, labels)


def count_parts(parts: Mapping[str, pa.Table], labels: Sequence[str]) -> dict[str, Any]:
    """The same of tables of samples that somebody else parted."""
    counts: dict[str, Any] = {"images": {}, "exams": {}, "patients": {}}
    counts |= {what: {label: {} for label in labels} for what in ("positives", "unknown", "boxes")}
    for split, part in parts.items():
        counts["images"][split] = part.num_rows
        counts["exams"][split] = len(part.column("exam_id").unique())
        counts["patients"][split] = len(part.column("patient_id").unique())
        boxes = _value_counts(pc.struct_field(pc.list_flatten(part.column("boxes")), "label"))
        for label in labels:
            known = _value_counts(part.column(samples.LABEL_PREFIX + label))
            counts["positives"][label][split] = known[1]
            counts["unknown"][label][split] = known[UNKNOWN]
            counts["boxes"][label][split] = boxes[label]
    return counts


def _value_counts(column: pa.ChunkedArray) -> Counter[Any]:
    """How often each value stands in a column."""
    return Counter({pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()})


def _line(name: str, by_split: dict[str, int]) -> list[str]:
    return [name, *(str(by_split[split]) for split in SPLITS), str(sum(by_split.values()))]
