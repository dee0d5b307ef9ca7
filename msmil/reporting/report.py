"""report.html: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Final

import msmil
from msmil.evaluation.predictions import write_atomically
from msmil.reporting.figures.style import SERIES
from msmil.reporting.html import Budget, Markup, Section, element, join, missing, page
from msmil.reporting.run_files import RunFiles, read_run, run_names
from msmil.reporting.sections.comparison import comparison_section
from msmil.reporting.sections.data import data_section, recipe_section
from msmil.reporting.sections.gallery import gallery_section
from msmil.reporting.sections.glance import glance
from msmil.reporting.sections.results import (
    curves_section,
    localisation_section,
    results_section,
    scales_section,
)
from msmil.reporting.sections.training import training_section

LIMIT_BYTES: Final = 15_000_000
_TEXT_BYTES: Final = 1_000_000  # of all sections
_RUN_BYTES: Final = 4_000  # of a run in the tables
DETAILED: Final = len(SERIES)  # runs with sections of their own: as many as one picture tells apart


def write_report(folders: Sequence[Path], output: Path, *, split: str, show_ids: bool) -> int:
    """Write the report of these runs, and return its length in bytes.

    Args:
        folders: run folders, in the order in which they appear.
        output: the HTML file; it appears under its name only when whole.
        split: that was evaluated.
        show_ids: name images, exams and patients; otherwise images have numbers.

    Raises:
        UserError: one is no run folder; the file cannot be written.
    """
    names = run_names(folders)
    runs = [read_run(folder, name=name, split=split) for folder, name in zip(folders, names, strict=True)]
    encoded = build_report(runs, show_ids=show_ids).encode("utf-8")
    write_atomically(output, encoded)
    return len(encoded)


def build_report(runs: Sequence[RunFiles], *, show_ids: bool) -> str:
    """The page, below LIMIT_BYTES: what does not fit is left out and said."""
    budget = Budget(LIMIT_BYTES - _TEXT_BYTES - _RUN_BYTES * len(runs))
    if len(runs) == 1:
        (run,) = runs
        sections = [(section, ()) for section in _run_sections(run, "", budget, show_ids=show_ids)]
        return page(f"msmil report: {run.name}", join([_intro(runs), glance(run)]), sections, _css())
    return page(f"msmil report: {len(runs)} runs", _intro(runs), _side_by_side(runs, budget, show_ids=show_ids), _css())


def _side_by_side(
    runs: Sequence[RunFiles], budget: Budget, *, show_ids: bool
) -> list[tuple[Section, Sequence[Section]]]:
    """The comparison, then the sections of the first runs; each may use its share of what is left."""
    detailed = runs[:DETAILED]
    with budget.share(len(detailed) + 1) as part:
        sections: list[tuple[Section, Sequence[Section]]] = [(comparison_section(runs, detailed, part), ())]
    for place, run in enumerate(detailed):
        with budget.share(len(detailed) - place) as part:
            below = _run_sections(run, f"run-{place + 1}-", part, show_ids=show_ids)
        sections.append((Section(f"run-{place + 1}", f"Run {run.name}", glance(run), collapsed=True), below))
    if len(runs) > len(detailed):
        names = ", ".join(run.name for run in runs[DETAILED:])
        text = f"Only the first {DETAILED} runs have sections of their own; left out: {names}."
        more = missing(text, "msmil report RUN")
        sections.append((Section("left-out", "Runs without sections of their own", more), ()))
    return sections


def _run_sections(run: RunFiles, prefix: str, budget: Budget, *, show_ids: bool) -> list[Section]:
    """All about a run. What could not be used of its files is known, and said first, once all sections are made."""
    first, *others = (
        data_section(run, prefix),
        recipe_section(run, prefix),
        results_section(run, prefix),
        curves_section(run, prefix, budget),
        scales_section(run, prefix, budget),
        localisation_section(run, prefix),
        training_section(run, prefix, budget),
        gallery_section(run, prefix, budget, show_ids=show_ids),
    )
    problems = [missing(text) for text in dict.fromkeys(run.problems)]
    return [replace(first, body=join([*problems, first.body])), *others]


def _intro(runs: Sequence[RunFiles]) -> Markup:
    now = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    where = runs[0].folder if len(runs) == 1 else f"{len(runs)} run folders"
    text = f"Made by msmil {msmil.__version__} on {now} from {where}. "
    warning = "Research software, no medical device: nothing here has been validated for diagnosis."
    return element("p", text + warning, class_="small")


def _css() -> str:
    return (files("msmil.reporting") / "style.css").read_text(encoding="utf-8")
