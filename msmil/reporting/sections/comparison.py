"""Several runs side by side: one row per run, what differs between them, and their curves in one picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

from msmil.config_io import flatten
from msmil.evaluation.bootstrap import PatientBootstrap
from msmil.evaluation.classification import rank
from msmil.evaluation.results import columns, number
from msmil.reporting.figures import Series, intervals, lines
from msmil.reporting.figures.style import words
from msmil.reporting.html import Budget, Markup, Section, element, esc, figures, join, missing, paragraph, table
from msmil.reporting.html import with_bounds as bounds
from msmil.reporting.run_files import RunFiles
from msmil.reporting.sections.results import SPLIT_NAMES, confidence
from msmil.reporting.trees import bounds_at, mapping_at, number_at, text_at, whole_at

_LABEL_COLUMNS: Final = 6
_OPTION_COLUMNS: Final = 8
_RUN_COLUMNS: Final = 8
_ROWS_OF_FIGURE: Final = 40
_NOT_AN_OPTION: Final = ("name", "output_dir")
_REPEATED: Final = {"seed", "data.fold", "data.folds", "data.fold_seed"}  # what `msmil repeat` varies
_LONGEST_VALUE: Final = 40


def comparison_section(runs: Sequence[RunFiles], detailed: Sequence[RunFiles], budget: Budget) -> Section:
    """All runs in one table; the curves of those that are reported in detail.

    Args:
        runs: all of them.
        detailed: the first of them, at most as many as a picture can tell apart.
        budget: of pictures.
    """
    labels = list(dict.fromkeys(label for run in runs for label in run.labels))
    differing = _differing(runs)
    parts = [_warnings(runs), _results(runs, labels[:_LABEL_COLUMNS], differing)]
    if len(labels) > _LABEL_COLUMNS:
        parts.append(missing(f"{len(labels) - _LABEL_COLUMNS} further labels are in the sections of the runs."))
    parts += [element("h3", "What differs in their configurations"), _options(runs, differing)]
    parts += [element("h3", "Curves side by side"), figures(_figures(runs, detailed, labels), budget)]
    return Section("comparison", f"{len(runs)} runs side by side", join(parts))


def _warnings(runs: Sequence[RunFiles]) -> Markup:
    """What makes runs incomparable."""
    judged = [run for run in runs if mapping_at(run.results, "labels")]
    texts = []
    if len(judged) < len(runs):
        names = ", ".join(run.name for run in runs if run not in judged)
        split = judged[0].split if judged else runs[0].split
        texts.append(f"Not evaluated on the {SPLIT_NAMES[split]} split: {names}.")
    if len({run.judged_images for run in judged}) > 1:
        text = "The fingerprints of the data they were judged on differ (see the column data): compare only runs that "
        texts.append(text + "were judged on the same images.")
    unfinished = [run.name for run in runs if run.is_finished is False]
    if unfinished:
        texts.append(f"Training is not finished: {', '.join(unfinished)}.")
    return join([missing(text) for text in texts])


def _results(runs: Sequence[RunFiles], labels: Sequence[str], differing: Sequence[str]) -> Markup:
    head = ["run", "epochs", "checkpoint", "data", "images", "mean AUROC", *(f"AUROC, {words(one)}" for one in labels)]
    rows: list[list[object]] = []
    for run in runs:
        results = run.results
        cells = [bounds(number_at(results, "mean_auroc"), bounds_at(results, "mean_auroc_ci"))]
        for label in labels:
            branch = run.branch(label)
            cells.append(bounds(branch["auroc"], branch["auroc_ci"]))
        images = whole_at(results, "images")
        checkpoint = text_at(results, "checkpoint").removeprefix("step_").lstrip("0")
        told = [f"step {checkpoint}" if checkpoint else number(None), run.judged_images[:8]]
        rows.append(
            [run.name, run.epochs_done or number(None), *told, number(None) if images is None else images, *cells]
        )
    if set(differing) <= _REPEATED and len(runs) > 1:
        rows.append(_mean_row(runs, labels))
    judged = next((run for run in runs if mapping_at(run.results, "labels")), None)
    parts = [table(head, rows, left=4, class_="runs")]
    if judged is not None:
        text = (
            f"Results on the {SPLIT_NAMES[judged.split]} split; brackets: {_coverage(runs)} from resampled patients of "
        )
        parts.append(paragraph(text + "each run's own images.", "small"))
    return join(parts)


def _coverage(runs: Sequence[RunFiles]) -> str:
    """The intervals in words; without a number where runs have different ones."""
    found = {confidence(run) for run in runs if mapping_at(run.results, "labels")}
    return f"{found.pop():.0%} interval" if len(found) == 1 else "interval"


def _mean_row(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[object]:
    """Mean and sample standard deviation of runs that differ in nothing but seed or fold."""
    cells: list[object] = []
    for keys in (("mean_auroc",), *(("labels", label, "auroc") for label in labels)):
        values = [value for run in runs if (value := number_at(run.results, *keys)) is not None]
        if not values:
            cells.append(number(None))
            continue
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        count = "" if len(values) == len(runs) else f" ({len(values)} runs)"
        cells.append(f"{statistics.fmean(values):.3f}{spread}{count}")
    return ["mean ± standard deviation", "", "", "", "", *cells]


def _differing(runs: Sequence[RunFiles]) -> list[str]:
    """Options whose values differ between runs."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [key for key in keys if key not in _NOT_AN_OPTION and len({repr(one.get(key)) for one in flat}) > 1]


def _options(runs: Sequence[RunFiles], differing: Sequence[str]) -> Markup:
    """A row per option where few runs are compared, else a row per run."""
    if not differing:
        return paragraph("Nothing but their names.")
    few = len(runs) <= _RUN_COLUMNS
    shown = differing if few else differing[:_OPTION_COLUMNS]
    flat = [flatten(run.config) for run in runs]
    names = [Markup(f"<code>{esc(key)}</code>") for key in shown]
    if few:
        rows = [[name, *(_short(one.get(key)) for one in flat)] for name, key in zip(names, shown, strict=True)]
        return table(["option", *(run.name for run in runs)], rows, class_="options")
    by_run = [[run.name, *(_short(one.get(key)) for key in shown)] for run, one in zip(runs, flat, strict=True)]
    parts = [table(["run", *names], by_run, class_="runs options")]
    if len(differing) > len(shown):
        parts.append(missing(f"They also differ in {', '.join(differing[_OPTION_COLUMNS:])}."))
    return join(parts)


def _short(value: object) -> str:
    text = number(None) if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"...{text[3 - _LONGEST_VALUE :]}"


def _figures(runs: Sequence[RunFiles], detailed: Sequence[RunFiles], labels: Sequence[str]) -> list[tuple[Any, str]]:
    drawn = []
    shown = runs[:_ROWS_OF_FIGURE]
    of = f" (the first {len(shown)} runs)" if len(shown) < len(runs) else ""
    for label in labels[:_LABEL_COLUMNS]:
        named = [(run.name, run.branch(label)) for run in shown]
        rows = [(name, b["auroc"], b["auroc_ci"]) for name, b in named if b["auroc"] is not None]
        if rows:
            figure = intervals(f"{words(label)}: AUROC{of}", rows, x_label=f"AUROC, {_coverage(runs)}")
            drawn.append((figure, f"{words(label)}: AUROC and interval of every run{of}, as in the table"))
    for label in labels[:_LABEL_COLUMNS]:
        series = [one for run in detailed if (one := _roc(run, label)) is not None]
        if series:
            figure = lines(
                f"{words(label)}: ROC", series, x_label="1 - specificity", y_label="sensitivity", unit_square=True
            )
            drawn.append((figure, f"{words(label)}: ROC curves of {', '.join(one.name for one in series)}"))
    for tag, title in (("train/loss/total", "Training loss"), ("val/auroc/mean", "Validation AUROC, mean of labels")):
        series = [Series(run.name, *points) for run in detailed if (points := run.curves.one(tag)) is not None]
        if series:
            figure = lines(title, series, y_label=title.split(",")[0].split()[-1], smooth=tag.startswith("train"))
            drawn.append((figure, f"{title} of {', '.join(one.name for one in series)} over training steps"))
    return drawn


def _roc(run: RunFiles, label: str) -> Series | None:
    found = run.predictions
    if not found or label not in found[0].target:
        return None
    bootstrap = PatientBootstrap([p.patient_id for p in found], replicates=0, seed=0)
    curve = bootstrap.roc(rank(*columns(found, label, None)), confidence(run))
    return None if curve is None else Series(run.name, curve.x_T, curve.y_T)
