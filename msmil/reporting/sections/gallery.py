"""The gallery: image, maps and true boxes of hits, misses and false alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msmil.evaluation.results import number
from msmil.reporting.figures.maps import legend_picture
from msmil.reporting.figures.style import words
from msmil.reporting.gallery import KINDS, Gallery
from msmil.reporting.html import Budget, Markup, Section, element, join, missing, paragraph, picture
from msmil.reporting.run_files import RunFiles
from msmil.reporting.sections.results import command, map_words, not_evaluated
from msmil.reporting.trees import at, bounds_at, list_at, mapping_at, number_at, text_at, whole_at

KIND_NAMES: Final = {"hit": "Hits", "miss": "Misses", "false_alarm": "False alarms"}
_WITH_THRESHOLD: Final = {
    "hit": "positive and called positive, the most confident first",
    "miss": "positive but called negative, the least probable first",
    "false_alarm": "negative but called positive, the most probable first",
}
_WITHOUT: Final = {
    "hit": "the most probable positive images (no operating point could be chosen)",
    "miss": "the least probable positive images (no operating point could be chosen)",
    "false_alarm": "the most probable negative images (no operating point could be chosen)",
}
_LARGE: Final = ("image", "merged")
Shown = list[tuple[Mapping[str, Any], dict[str, bytes]]]  # cases with their pictures by name


def gallery_section(run: RunFiles, prefix: str, budget: Budget, *, show_ids: bool) -> Section:
    """Pictures of every label: the first of each kind where not all fit."""
    title = "Gallery"
    if not mapping_at(run.results, "labels"):
        return Section(f"{prefix}gallery", title, not_evaluated(run))
    if run.gallery is None:
        asked = at(run.config, "evaluate", "gallery") != 0
        text = "There is no gallery that belongs to these results"
        text += "." if asked else ": the configuration asks for none (evaluate.gallery: 0)."
        return Section(f"{prefix}gallery", title, missing(text, command(run) if asked else ""))
    cases = [case for case in list_at(run.gallery.index, "cases") if isinstance(case, Mapping)]
    shown, lost = _choose(run.gallery, cases, budget)
    parts = [_legend()]
    if len(shown) + lost < len(cases):
        left_out = len(cases) - len(shown) - lost
        where = run.gallery.folder
        parts.append(missing(f"{left_out} of {len(cases)} images are left out for the size of this file; see {where}."))
    if lost:
        parts.append(missing(f"Pictures of {lost} images are gone from {run.gallery.folder}.", command(run)))
    for label in mapping_at(run.gallery.index, "labels"):
        parts.append(_label(run, str(label), shown, show_ids=show_ids))
    return Section(f"{prefix}gallery", title, join(parts))


def _choose(gallery: Gallery, cases: Sequence[Mapping[str, Any]], budget: Budget) -> tuple[Shown, int]:
    """The cases that fit, with their pictures, in their order, and how many have lost theirs.

    The first of every label and kind come before any second one.
    """
    place: dict[tuple[str, str], int] = {}
    ranked = []
    for position, case in enumerate(cases):
        key = (text_at(case, "label"), text_at(case, "kind"))
        place[key] = place.get(key, 0) + 1
        ranked.append((place[key], position, case))
    found: list[tuple[int, Mapping[str, Any], dict[str, bytes]]] = []
    lost, full = 0, False
    for _, position, case in sorted(ranked, key=lambda entry: entry[:2]):
        pictures = {text_at(one, "name"): gallery.picture(at(one, "file")) for one in list_at(case, "pictures")}
        whole = {name: data for name, data in pictures.items() if data is not None}
        if len(whole) < len(pictures) or not pictures:
            lost += 1
        elif not full and budget.fits(list(whole.values())):
            found.append((position, case, whole))
        else:
            full = True
    return [(case, pictures) for _, case, pictures in sorted(found, key=lambda entry: entry[0])], lost


def _label(run: RunFiles, label: str, shown: Shown, *, show_ids: bool) -> Markup:
    assert run.gallery is not None
    threshold = number_at(run.gallery.index, "labels", label, "threshold")
    meaning = _WITHOUT if threshold is None else _WITH_THRESHOLD
    parts = [element("h4", words(label))]
    for kind in KINDS:
        mine = [one for one in shown if text_at(one[0], "label") == label and text_at(one[0], "kind") == kind]
        count = whole_at(run.gallery.index, "labels", label, "counts", kind)
        parts.append(element("h5", f"{KIND_NAMES[kind]}: {meaning[kind]}"))
        if not mine:
            none = count == 0
            parts.append(paragraph("There is none." if none else "Not shown here.", "small"))
            continue
        parts.append(paragraph(f"{len(mine)} of {count} shown.", "small"))
        parts += [
            _case(case, pictures, threshold, place, show_ids=show_ids) for place, (case, pictures) in enumerate(mine, 1)
        ]
    return join(parts)


def _case(
    case: Mapping[str, Any], pictures: Mapping[str, bytes], threshold: float | None, place: int, *, show_ids: bool
) -> Markup:
    name = f"{words(text_at(case, 'label'))}, {words(text_at(case, 'kind'))} {place}"
    ranges = {text_at(one, "name"): bounds_at(one, "range") for one in list_at(case, "pictures")}
    large = [_picture(name, one, pictures[one], None) for one in _LARGE if one in pictures]
    small = [_picture(name, one, data, ranges.get(one)) for one, data in pictures.items() if one not in _LARGE]
    columns = max(1, len({one.rpartition("_")[2] for one in pictures if one not in _LARGE}))
    maps = f'<div class="maps" style="--columns: {columns}">{"".join(small)}</div>' if small else ""
    body = f'<div class="pictures"><div class="large">{"".join(large)}</div>{maps}</div>'
    return Markup(f'<article class="case"><p>{_caption(case, threshold, show_ids=show_ids)}</p>{body}</article>')


def _caption(case: Mapping[str, Any], threshold: float | None, *, show_ids: bool) -> Markup:
    told = [text_at(case, "view").strip()]
    probability = f"probability {number(number_at(case, 'probability'))}"
    told.append(probability if threshold is None else f"{probability} (threshold {threshold:.3f})")
    others = [words(str(one)) for one in list_at(case, "positive_for") if one != text_at(case, "label")]
    if others:
        told.append(f"also positive for {', '.join(others)}")
    peak = at(case, "peak_in_box")
    if isinstance(peak, bool):
        told.append("peak of the merged map in a true box" if peak else "peak of the merged map outside the true boxes")
    name = element("b", f"Image {whole_at(case, 'number')}")
    if show_ids:
        ids = [f"image {text_at(case, 'image_id')}", f"exam {text_at(case, 'exam_id')}"]
        told.append(", ".join([*ids, f"patient {text_at(case, 'patient_id')}"]))
    return Markup(f"{name} · {element('span', ' · '.join(one for one in told if one))}")


def _picture(case: str, name: str, data: bytes, found: tuple[float, float] | None) -> Markup:
    told = {"image": "image with true boxes", "merged": "merged map over the image"}.get(name, map_words(name))
    span = "" if found is None else f' <span class="ci">{found[0]:.2g} to {found[1]:.2g}</span>'
    caption = f"<figcaption>{element('span', told)}{span}</figcaption>"
    return Markup(f"<figure>{picture(data, f'{case}: {told}')}{caption}</figure>")


def _legend() -> Markup:
    bar = picture(legend_picture(), "colours of maps, from dark violet (lowest value) over green to yellow (highest)")
    text = "Every map is stretched from its lowest to its highest value inside the breast, so colours compare places "
    text += "within one picture, not pictures. The two values are below it (attention: weights; instance: "
    text += "probabilities). Images are called by their place in the table of predictions."
    boxes = '<i class="box"></i> true box of the label <i class="box dashed"></i> true box of another label'
    scale = f'<span class="bar">lowest {bar} highest</span>'
    return Markup(f'<div class="legend">{scale} <span>{boxes}</span></div>{paragraph(text, "small")}')
