"""An archive of phantoms in the published layout of VinDr-Mammo's PNG release.

    OUT/vindrmammo_grouped_df.csv               one row per image, the columns and the quoting of the published table
    OUT/images_png/<exam>/<image_id>.png        8-bit grey
    OUT/phantom.json                            what it was made with

What is written depends on the arguments alone, not on the number of processes or on interruptions.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from shards.codecs import encode
from shards.errors import UserError
from shards.files import atomic_file, remove_leftovers
from shards.phantoms.canvas import Canvas
from shards.phantoms.draw import draw_phantom, phantom_boxes
from shards.phantoms.exam import LABELS, SIDES, VIEWS, BreastPlan, exam_id, image_id, plan_breast
from shards.pool import default_processes, run_tasks
from shards.types import Box, View

TableSplit = Literal["training", "test"]
Cell = str | int

TABLE_NAME: Final = "vindrmammo_grouped_df.csv"
IMAGES_NAME: Final = "images_png"
SETTINGS_NAME: Final = "phantom.json"
TABLE_SPLITS: Final[tuple[TableSplit, ...]] = ("training", "test")
COLUMNS: Final = (
    "image_id",
    "patient_id",
    "laterality",
    "view",
    "finding_categories",
    "finding_birads",
    "breast_birads",
    "breast_density",
    "split",
    "fold",
    *(name.replace(" ", "_") for name in LABELS),
    "resized_xmin",
    "resized_ymin",
    "resized_xmax",
    "resized_ymax",
)
DRAWING_VERSION: Final = 1  # to be raised with every change of what phantoms look like
FOLDS: Final = 4
SMALLEST_PX: Final = 64
_IMAGES_PER_EXAM: Final = len(SIDES) * len(VIEWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSettings:
    """All that the pictures and the table depend on."""

    seed: int
    exams_training: int
    exams_test: int
    height_px: int
    width_px: int
    drawing_version: int = DRAWING_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomReport:
    """What an archive of phantoms holds; `str()` of it is the table for people.

    counts: {what: {"training": n, "test": n}} with images, exams, and positive images and boxes of each label;
    written: images that are new; kept: images that were there before.
    """

    table: Path
    images_folder: Path
    counts: dict[str, dict[TableSplit, int]]
    written: int
    kept: int

    def __str__(self) -> str:
        head = [f"{self.table}: {self.written} images drawn, {self.kept} kept", ""]
        rows = [("", *TABLE_SPLITS), *((what, *map(str, count.values())) for what, count in self.counts.items())]
        return "\n".join([*head, *(f"{row[0]:34}{row[1]:>10}{row[2]:>8}" for row in rows)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExamTask:
    out: Path
    settings: PhantomSettings
    exam: int


@dataclass(frozen=True, slots=True)
class _ExamResult:
    rows: list[dict[str, Cell]]
    written: int


def write_phantoms(
    out: Path,
    *,
    exams: Mapping[TableSplit, int],
    height_px: int,
    width_px: int,
    seed: int = 0,
    processes: int | None = None,
    quiet: bool = False,
) -> PhantomReport:
    """Draw an archive of phantom exams of four views. What an interrupted call wrote is kept and completed.

    Args:
        out: the folder to fill; created where it is missing.
        exams: number of exams of "training" and "test".
        height_px: height of the images, which show 200 mm from top to bottom.
        width_px: width of the images.
        seed: the archive is a function of it and of the numbers above.
        processes: how many draw at a time; by default one per core.
        quiet: show no progress.

    Raises:
        UserError: a number is out of range, `out` holds another archive or cannot be written, or the disk is full.
    """
    settings = _checked(out, exams, height_px, width_px, seed)
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes", fix="give at least 1 (--processes)")
    with _os_errors_for_users(out):
        _start_or_resume(out, settings)
    tasks = [
        _ExamTask(out=out, settings=settings, exam=exam)
        for exam in range(settings.exams_training + settings.exams_test)
    ]
    results = run_tasks(
        _write_exam,
        tasks,
        processes=processes or default_processes(),
        what="drawing phantoms",
        unit="images",
        total=_IMAGES_PER_EXAM * len(tasks),
        quiet=quiet,
    )
    rows = [row for result in results for row in result.rows]
    with _os_errors_for_users(out), atomic_file(out / TABLE_NAME) as file:
        file.write(_csv(rows))
    return _report(out, rows, sum(result.written for result in results))


def _checked(out: Path, exams: Mapping[TableSplit, int], height_px: int, width_px: int, seed: int) -> PhantomSettings:
    unknown = sorted(set(exams) - set(TABLE_SPLITS))
    if unknown:
        raise UserError(f"split {unknown[0]!r} of phantoms", fix="use training and test", file=out)
    training, test = (exams.get(split, 0) for split in TABLE_SPLITS)
    if min(training, test) < 0 or training + test < 1:
        fix = "ask for at least one exam, and for none below 0 (--exams-training, --exams-test)"
        raise UserError(f"{training} training and {test} test exams", fix=fix, file=out)
    if min(height_px, width_px) < SMALLEST_PX:
        fix = f"make them at least {SMALLEST_PX} x {SMALLEST_PX} (--height, --width)"
        raise UserError(f"phantoms of {height_px} x {width_px} pixels (height x width)", fix=fix, file=out)
    if seed < 0:
        raise UserError(f"seed {seed}", fix="give a seed of 0 or more (--seed)", file=out)
    return PhantomSettings(seed=seed, exams_training=training, exams_test=test, height_px=height_px, width_px=width_px)


def _start_or_resume(out: Path, settings: PhantomSettings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path, now = out / SETTINGS_NAME, asdict(settings)
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError("is no JSON", fix="delete the folder, or choose another one", file=path) from error
        changed = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
        if changed:
            was = before.get(changed[0]) if isinstance(before, dict) else None
            thing = f"holds phantoms made with other settings: {changed[0]} was {was}, now {now[changed[0]]}"
            raise UserError(thing, fix="use another folder, delete this one, or give the former options", file=out)
    else:
        foreign = [name for name in (TABLE_NAME, IMAGES_NAME) if (out / name).exists()]
        if foreign:
            raise UserError(f"holds {foreign[0]} of another archive", fix="choose an empty folder", file=out)
        with atomic_file(path) as file:
            file.write((json.dumps(now, indent=1) + "\n").encode())
    remove_leftovers(out)


def _write_exam(task: _ExamTask, tick: Callable[[], object]) -> _ExamResult:
    """Draw what is missing of an exam; its rows of the table."""
    settings, rows, written = task.settings, [], 0
    canvas = Canvas(settings.height_px, settings.width_px)
    folder = task.out / IMAGES_NAME / exam_id(settings.seed, task.exam)
    split = TABLE_SPLITS[task.exam >= settings.exams_training]
    with _os_errors_for_users(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        for side in SIDES:
            plan = plan_breast(settings.seed, task.exam, side)
            for view in VIEWS:
                name = f"{image_id(settings.seed, task.exam, side, view)}.png"
                if (folder / name).exists():
                    boxes = phantom_boxes(settings.seed, task.exam, side, view, canvas)
                else:
                    phantom = draw_phantom(settings.seed, task.exam, side, view, canvas)
                    with atomic_file(folder / name) as file:
                        file.write(encode(phantom.image_HW, "png"))
                    boxes, written = phantom.boxes, written + 1
                rows.append(_row(plan, view, name, boxes, split, task.exam % FOLDS))
                tick()
    return _ExamResult(rows, written)


def _row(
    plan: BreastPlan, view: View, name: str, boxes: Sequence[Box], split: TableSplit, fold: int
) -> dict[str, Cell]:
    corners = [(box.x0, box.y0, box.x1, box.y1) for box in boxes] or [(0.0, 0.0, 0.0, 0.0)]
    findings = [str([box.label]) for box in boxes] or ["['No Finding']"]
    xmin, ymin, xmax, ymax = (str([round(value, 3) for value in values]) for values in zip(*corners, strict=True))
    values: tuple[Cell, ...] = (
        name,
        plan.exam_id,
        plan.laterality,
        view,
        json.dumps(findings),
        json.dumps([plan.birads for _ in boxes]),
        plan.birads,
        f"DENSITY {plan.shape.density}",
        split,
        fold,
        *(int(plan.labels[label]) for label in LABELS),
        xmin,
        ymin,
        xmax,
        ymax,
    )
    return dict(zip(COLUMNS, values, strict=True))


def _csv(rows: Sequence[dict[str, Cell]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _report(out: Path, rows: Sequence[dict[str, Cell]], written: int) -> PhantomReport:
    counts: dict[str, dict[TableSplit, int]] = {}

    def add(what: str, split: TableSplit, number: int) -> None:
        by_split = counts.setdefault(what, dict.fromkeys(TABLE_SPLITS, 0))
        by_split[split] += number

    for split in TABLE_SPLITS:
        of_split = [row for row in rows if row["split"] == split]
        add("images", split, len(of_split))
        add("exams", split, len({row["patient_id"] for row in of_split}))
        for label in LABELS:
            add(f"{label} positive", split, sum(row[label.replace(" ", "_")] == 1 for row in of_split))
            add(f"{label} boxes", split, sum(str(row["finding_categories"]).count(label) for row in of_split))
    return PhantomReport(
        table=out / TABLE_NAME,
        images_folder=out / IMAGES_NAME,
        counts=counts,
        written=written,
        kept=len(rows) - written,
    )


@contextmanager
def _os_errors_for_users(path: Path) -> Iterator[None]:
    """A folder that cannot be made or written is the user's to mend."""
    try:
        yield
    except OSError as error:
        thing, fix = f"cannot be written ({error.strerror})", "choose a folder that you can write to"
        raise UserError(thing, fix=fix, file=error.filename or path) from error
