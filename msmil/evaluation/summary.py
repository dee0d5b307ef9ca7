"""Several runs of one experiment as one table: summary.csv and summary.json, one column per number.

A column is named split/label/branch/metric: test/Mass/aggregated/auroc, val/Mass/scale_16/f1; with boxes also
test/Mass/<map>/peak_in_box_rate; and <split>/mean_auroc over the labels.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from msmil.evaluation.classification import METRICS
from msmil.evaluation.predictions import write_atomically
from msmil.evaluation.results import number
from shards.tables import aligned

Values = dict[str, float | None]
_SHOWN: Final = ("auroc", "average_precision", "balanced_accuracy")


@dataclass(frozen=True)
class Summary:
    """Values by column: of each run, their mean, their sample standard deviation (n - 1), and how many are defined.

    A metric that a run does not define (None) is left out of mean and std; `defined` tells it.
    """

    runs: dict[str, Values]
    mean: Values
    std: Values
    defined: dict[str, int]


def summarise(results: Mapping[str, Mapping[str, Any]]) -> Summary:
    """The summary of the results (metrics/<split>.json) of each run, by the run's name."""
    by_run = {name: run_values(found) for name, found in results.items()}
    columns = list(dict.fromkeys(column for values in by_run.values() for column in values))
    runs = {name: {column: values.get(column) for column in columns} for name, values in by_run.items()}
    known = {column: [v for values in runs.values() if (v := values[column]) is not None] for column in columns}
    return Summary(
        runs=runs,
        mean={column: statistics.fmean(values) if values else None for column, values in known.items()},
        std={column: statistics.stdev(values) if len(values) > 1 else None for column, values in known.items()},
        defined={column: len(values) for column, values in known.items()},
    )


def run_values(results: Mapping[str, Any]) -> Values:
    """The columns of one run, of its split and of the validation split evaluated with it."""
    values = _split_values(results["split"], results)
    for label, by_map in (results["localisation"] or {}).items():
        for name, found in by_map.items():
            values[f"{results['split']}/{label}/{name}/peak_in_box_rate"] = found["rate"]
    if "validation" in results:
        values |= _split_values("val", results["validation"])
    return values


def _split_values(split: str, results: Mapping[str, Any]) -> Values:
    values: Values = {}
    for label, merged in results["labels"].items():
        branches = {"aggregated": merged} | {f"scale_{scale}": found for scale, found in merged["scales"].items()}
        for branch, found in branches.items():
            values |= {f"{split}/{label}/{branch}/{metric}": found[metric] for metric in METRICS}
    values[f"{split}/mean_auroc"] = results["mean_auroc"]
    return values


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.csv and summary.json; each appears only when whole. Numbers are read back exactly.

    The CSV has a row per run, then the rows mean, std and defined; what is undefined is empty (null in JSON).

    Raises:
        UserError: a file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *summary.mean])
    rows: dict[str, Mapping[str, float | None]] = {**summary.runs, "mean": summary.mean, "std": summary.std}
    for name, values in (rows | {"defined": summary.defined}).items():
        writer.writerow([name, *("" if value is None else repr(value) for value in values.values())])
    write_atomically(folder / "summary.csv", text.getvalue().encode("utf-8"))
    encoded = json.dumps(asdict(summary), indent=2, allow_nan=False)
    write_atomically(folder / "summary.json", encoded.encode("utf-8"))


def summary_table(summary: Summary, labels: Sequence[str]) -> str:
    """Mean and standard deviation of the main metrics, per split, label and branch, for a terminal."""
    rows = [["", "", *_SHOWN]]
    for column in summary.mean:
        split, _, branch_and_metric = column.partition("/")
        label, _, rest = branch_and_metric.partition("/")
        branch, _, metric = rest.partition("/")
        if label in labels and metric == _SHOWN[0]:
            stem = column.removesuffix(metric)
            rows.append([f"{split} {label}", branch, *(_spread(summary, stem + name) for name in _SHOWN)])
    lines = [f"Mean and standard deviation of {len(summary.runs)} runs ({', '.join(summary.runs)})"]
    return "\n".join(lines + aligned(rows, left=2, indent=2))


def _spread(summary: Summary, column: str) -> str:
    text = f"{number(summary.mean[column])} +- {number(summary.std[column])}"
    return text if summary.defined[column] == len(summary.runs) else f"{text} (of {summary.defined[column]})"
