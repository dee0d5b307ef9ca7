"""What a manifest of a million images costs: `python -m tests.benchmarks.manifest`.

Everything is measured in a fresh process that has imported what it needs: opening (the best of three), and what a
worker takes more than before, once it has unpickled the manifest and found some thousand samples. Pages of the mapped
file are told apart: all processes of a machine share them, and the kernel takes them back when it needs them. The
baseline is the usual way: an index of Python objects, one for each sample, in every worker.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from shards import samples
from shards.manifest import Manifest, read_manifest, write_manifest

LABELS: Final = ("Mass", "Suspicious_Calcification")
PER_SHARD: Final = 256
LOOKED_UP: Final = 4096
_OPENINGS: Final = 3
_SAMPLE_BYTES: Final = 1_400_000


def write_rows(folder: Path, rows: int) -> Path:
    """A manifest of so many images, four to an exam; there are no tars."""
    row_N = np.arange(rows)
    texts = {
        "key": _text("image-%08d", row_N),
        "image_id": _text("1.2.840.113654.2.70.1.%08d", row_N),
        "exam_id": _text("exam-%08d", row_N // 4),
        "patient_id": _text("patient-%08d", row_N // 4),
        "laterality": pa.array(np.array(["L", "R"])[row_N % 2]),
        "view": pa.array(np.array(["CC", "MLO"])[row_N // 2 % 2]),
        "split": pa.array(np.array(["train"] * 8 + ["val", "test"])[row_N // 4 % 10]),
        **{name: pa.array(np.full(rows, "unknown")) for name in ("manufacturer", "density", "birads")},
    }
    numbers: dict[str, Any] = {
        "shard": row_N // PER_SHARD,
        "offset_bytes": row_N % PER_SHARD * _SAMPLE_BYTES,
        "num_bytes": np.full(rows, _SAMPLE_BYTES - 4096),
        "fold": np.full(rows, -1),
    }
    columns: list[pa.Array] = []
    for field in samples.schema(LABELS, encoded=False):
        if field.name in texts:
            columns.append(texts[field.name].cast(field.type))
        elif field.name in numbers:
            columns.append(pa.array(numbers[field.name]).cast(field.type))
        elif field.name in ("sha256", "xxh3"):
            digests = np.random.default_rng(0).integers(0, 256, (rows, field.type.byte_width), np.uint8)
            columns.append(pa.FixedSizeBinaryArray.from_buffers(field.type, rows, [None, pa.py_buffer(digests)]))
        elif field.name == "boxes":
            empty = pa.array([], field.type.value_type)
            columns.append(pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int32)), empty).cast(field.type))
        else:
            columns.append(pa.array(np.zeros(rows)).cast(field.type))
    shards = -(-rows // PER_SHARD)
    fields: dict[str, Any] = {
        "name": "benchmark", "labels": list(LABELS), "height_px": 1520, "width_px": 912, "dtype": "uint8",
        "codec": "png", "recipe": {"name": "as_is"}, "fingerprint": "0" * 64, "settings": {}, "counts": {},
        "dropped": [], "notes": {},
        "shards": [
            {
                "name": f"shard-{shard:06d}.tar",
                "num_bytes": PER_SHARD * _SAMPLE_BYTES,
                "sha256": "0" * 64,
                "num_samples": min(PER_SHARD, rows - shard * PER_SHARD),
            }
            for shard in range(shards)
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, pa.table(columns, schema=samples.schema(LABELS, encoded=False)), fields)
    return folder


def _text(form: str, row_N: np.ndarray) -> pa.Array:
    return pa.array(np.char.mod(form, row_N))


def in_a_fresh_process(what: str, folder: Path) -> dict[str, float]:
    """Seconds (by the clock, and of processors) and MB that something takes in a process of its own.

    It has imported all it needs before.
    """
    command = [sys.executable, "-m", "tests.benchmarks.manifest", "--measure", what, "--folder", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(what: str, folder: Path) -> dict[str, float]:
    """See `in_a_fresh_process`."""
    pickled = folder / "manifest.pickle"
    pa.chunked_array([["a"]]).take(pa.array([0])).to_pylist()  # imports what it needs
    before = _memory_mb()
    kept: Any = None
    seconds, processor_seconds = [], []
    for _ in range(_OPENINGS if what == "open" else 1):
        start_s, start_of_processors_s = time.perf_counter(), time.process_time()
        kept = read_manifest(folder) if what == "open" else pickle.loads(pickled.read_bytes())
        if what == "worker":
            looked_up(kept)
        elif what == "objects":
            kept = as_objects(kept)
        seconds.append(time.perf_counter() - start_s)
        processor_seconds.append(time.process_time() - start_of_processors_s)
    after = _memory_mb()
    if what == "open":
        pickled.write_bytes(pickle.dumps(kept))
    return {
        "seconds": min(seconds),
        "processor_seconds": min(processor_seconds),
        "own_mb": after[0] - before[0],
        "shared_mb": after[1] - before[1],
    }


def looked_up(manifest: Manifest) -> None:
    """What a decoding process asks of a manifest, for some thousand rows all over it."""
    rows = np.random.default_rng(1).integers(0, len(manifest), LOOKED_UP)
    for row in rows.tolist():
        manifest.location(row, sha256=False)
        manifest.label_NK(LABELS, np.array([row]))


def as_objects(manifest: Manifest) -> list[dict[str, Any]]:
    """A dict for each sample, as an index in JSON would be read."""
    columns = ["key", "image_id", "shard", "offset_bytes", "num_bytes", "sha256"]
    rows: list[dict[str, Any]] = manifest.table.select(columns).to_pylist()
    return rows


def _memory_mb() -> tuple[float, float]:
    """This process's own memory, and the pages of files that it looks at."""
    words = Path("/proc/self/status").read_text().split()
    own, shared = (int(words[words.index(name) + 1]) / 1e3 for name in ("RssAnon:", "RssFile:"))
    return own, shared


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", choices=("open", "worker", "objects"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), args.rows)
        found = {what: in_a_fresh_process(what, Path(folder)) for what in ("open", "worker", "objects")}
    base = found["objects"]
    print(f"| {args.rows:,} images | time | of the baseline | own memory | of the baseline | mapped, shared |")
    print("|---|---|---|---|---|---|")
    for what, words in (
        ("objects", "baseline: an object for each image, in every worker"),
        ("open", "opened, with its checksum"),
        ("worker", f"a worker: sent to it, {LOOKED_UP} images looked up"),
    ):
        seconds, mb, shared = (found[what][key] for key in ("seconds", "own_mb", "shared_mb"))
        shares = [f"{value / of:.3f}" for value, of in ((seconds, base["seconds"]), (mb, base["own_mb"]))]
        print(f"| {words} | {seconds:.2f} s | {shares[0]} | {mb:.0f} MB | {shares[1]} | {shared:.0f} MB |")


if __name__ == "__main__":
    main()
