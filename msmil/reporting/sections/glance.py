"""A run at a glance: what it is, what it learned from, what it is worth."""

from __future__ import annotations

from msmil.evaluation.results import number
from msmil.reporting.figures.style import words
from msmil.reporting.html import Markup, element, join
from msmil.reporting.html import with_bounds as bounds
from msmil.reporting.run_files import RunFiles
from msmil.reporting.sections.results import SPLIT_NAMES
from msmil.reporting.trees import bounds_at, list_at, mapping_at, number_at, text_at, whole_at


def glance(run: RunFiles) -> Markup:
    """A few facts, as far as they are known."""
    facts: dict[str, object] = {"Labels": ", ".join(map(words, run.labels)), "Model": _model(run)}
    facts["Trained on"] = _trained_on(run)
    facts["Trained"] = run.progress
    if mapping_at(run.results, "labels"):
        images, patients = (whole_at(run.results, key) for key in ("images", "patients"))
        counts = f"{images} images of {patients} patients" if images and patients else "unknown images"
        facts["Judged on"] = f"{counts} ({SPLIT_NAMES[run.split]} split)"
        aurocs = [f"{words(label)} {_auroc(run, label)}" for label in run.labels]
        facts["AUROC"] = Markup("<br>".join(aurocs))
        if len(run.labels) > 1:
            facts["Mean AUROC"] = bounds(number_at(run.results, "mean_auroc"), bounds_at(run.results, "mean_auroc_ci"))
    else:
        facts["Judged on"] = f"nothing yet ({SPLIT_NAMES[run.split]} split)"
    pairs = [element("dt", name) + element("dd", value) for name, value in facts.items() if value]
    return element("dl", join(pairs), class_="glance")


def _auroc(run: RunFiles, label: str) -> Markup:
    branch = run.branch(label)
    return bounds(branch["auroc"], branch["auroc_ci"]) if branch["auroc"] is not None else Markup(number(None))


def _model(run: RunFiles) -> str:
    backbone, encoder = (text_at(run.config, "model", key) for key in ("backbone", "instance_encoder"))
    if not backbone:
        return ""
    scales = ", ".join(map(str, list_at(run.config, "model", "scales")))
    mil = [text_at(run.config, "model", key) for key in ("mil_encoder", "pooling", "scale_aggregator")]
    parts = [backbone, words(encoder), f"scales {scales}" if scales else "", *map(words, mil)]
    return ", ".join(part for part in parts if part)


def _trained_on(run: RunFiles) -> str:
    images, patients = (whole_at(run.trained_on, "counts", key, "train") for key in ("images", "patients"))
    return f"{images} images of {patients} patients" if images and patients else ""
