"""Figures of heat-maps from run folders, as an evaluation draws them; only phantoms belong into the documentation.

    python docs/figures/maps.py result runs/demo                      # docs/images/result.jpg
    python docs/figures/maps.py encoder runs/demo --out weights/demo  # its backbone, for another model to start from
    python docs/figures/maps.py compare runs/demo runs/demo_settrans  # docs/images/abmil_settrans.jpg

A run is one that `msmil evaluate` has judged on its test split. Start it where `data.shards` of the runs is found.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from safetensors.torch import load_file, save_file

from msmil.config_io import load_config
from msmil.detection.breast import breast_masks
from msmil.detection.heatmap import MERGED, maps
from msmil.engine.evaluate import Evaluation, find_checkpoint, open_evaluation
from msmil.engine.predict import forward_batches
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.evaluation.predictions import read_predictions
from msmil.models.centres import cell_centres
from msmil.models.weights import WEIGHTS_FILE
from msmil.reporting.figures import MapRow

IMAGES = Path(__file__).parents[1] / "images"
DPI = 130


@dataclass(frozen=True)
class Judged:
    """A run that was evaluated, with its network."""

    folder: Path
    evaluation: Evaluation

    def rows(self, label: str, image_ids: Sequence[str]) -> list[MapRow]:
        """The pictures of these test images, in this order."""
        pipeline, network = self.evaluation.pipeline, self.evaluation.network
        test = pipeline.manifest.rows("test")
        place = dict(zip(pipeline.manifest.text("image_id", test), test.tolist(), strict=True))
        chosen = np.array([place[image_id] for image_id in image_ids], np.int64)
        return list(self._map_rows(chosen, pipeline.labels.index(label), label, network))

    def _map_rows(self, rows_N: Any, k: int, label: str, network: Any) -> Iterator[MapRow]:
        pipeline = self.evaluation.pipeline
        offsets = cell_centres(network, pipeline.tile_hw)
        instance = network.judges_instances
        for batch, bag, output in forward_batches(pipeline, network, rows_N, instance_logits=instance, what="maps"):
            breast_BHW = breast_masks(batch.image_B1HW)
            found = maps(output, bag, breast_BHW, offsets).named()
            for b, row in enumerate(batch.sample_B.tolist()):
                yield MapRow(
                    image_HW=batch.image_B1HW[b, 0].numpy(),
                    breast_HW=breast_BHW[b].numpy(),
                    maps={name: map_BKHW[b, k].numpy() for name, map_BKHW in found.items()},
                    boxes=[box for box in pipeline.manifest.record(row).boxes if box.label == label],
                    title=f"p = {float(output.logit_BK[b, k].sigmoid()):.2f}",
                )


def open_run(folder: Path) -> Judged:
    """The best checkpoint of a run on its data, on the CPU."""
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    run = RunFolder(folder)
    config = load_config(run.config)
    found = find_checkpoint(run, "best", other_data=False)
    return Judged(folder, open_evaluation(config, run, Runtime(config.train), found, other_data=False))


def write_encoder(run: Path, out: Path) -> None:
    """The backbone of a run's best checkpoint, as a folder for `model.weights`."""
    checkpoint = find_checkpoint(RunFolder(run), "best", other_data=False)
    weights = load_file(checkpoint / WEIGHTS_FILE)
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value for key, value in weights.items() if key.startswith("backbone.")}, out / WEIGHTS_FILE)
    shutil.copy(checkpoint / "config.yaml", out)


def positives(run: Judged, label: str) -> list[str]:
    """Test images that have the label, from the most to the least probable."""
    found = [p for p in read_predictions(run.folder / "predictions" / "test.csv") if p.target[label] == 1]
    return [p.image_id for p in sorted(found, key=lambda p: (-p.probability[label], p.image_id))]


def result(run: Judged, out: Path) -> None:
    """Per label three images, evenly spread from the most to the least probable, and their merged maps."""
    parts = []
    for label in run.evaluation.pipeline.labels:
        ranked = positives(run, label)
        rows = run.rows(label, [ranked[round(share * (len(ranked) - 1))] for share in (0, 0.5, 1)])
        table = [
            [Panel(row, None, "") for row in rows],
            [Panel(row, MERGED, "merged map", overlay=True) for row in rows],
        ]
        names = [words(label), "", ""]
        parts.append(sheet(table, [f"{name}\n{row.title}" for name, row in zip(names, rows, strict=True)]))
    write(beside(parts), out)


def compare(runs: Sequence[Judged], names: Sequence[str], out: Path) -> None:
    """Attention of two models on the same phantoms: rows are scales, columns are models, one phantom per label.

    Per label the phantom is the one in the middle of the first run's ranking of positive images: neither its best nor
    its worst.
    """
    parts = []
    for label in runs[0].evaluation.pipeline.labels:
        ranked = positives(runs[0], label)
        rows = [run.rows(label, [ranked[len(ranked) // 2]])[0] for run in runs]
        scales = [name for name in rows[0].maps if name.startswith("attention_")]
        table = [
            [Panel(rows[0], None, f"scale {scale.rpartition('_')[2]}"), *(Panel(row, scale, "") for row in rows)]
            for scale in scales
        ]
        heads = [f"{name}\n{row.title}" for name, row in zip(names, rows, strict=True)]
        parts.append(sheet(table, [words(label), *heads]))
    write(beside(parts), out)


@dataclass(frozen=True)
class Panel:
    """One picture: the image (`map_name` None), a map, or a map laid over the image; a note above it."""

    row: MapRow
    map_name: str | None
    note: str
    overlay: bool = False


def sheet(table: Sequence[Sequence[Panel]], heads: Sequence[str]) -> Image.Image:
    """Pictures in rows and columns with a head over each column, as pixels."""
    height, width = table[0][0].row.image_HW.shape
    w_in, gap_in, note_in, head_in = 1.5, 0.07, 0.18, 0.22
    h_in = w_in * height / width
    size_in = ((w_in + gap_in) * len(heads), head_in + (note_in + h_in) * len(table))
    figure = Figure(figsize=size_in, facecolor="white")
    FigureCanvasAgg(figure)
    for i, panels in enumerate(table):
        for j, panel in enumerate(panels):
            left, top = (w_in + gap_in) * j, head_in + note_in + (note_in + h_in) * i
            place = (left / size_in[0], 1 - (top + h_in) / size_in[1], w_in / size_in[0], h_in / size_in[1])
            axes = figure.add_axes(place)
            show(axes, panel)
    for j, head in enumerate(heads):
        x = ((w_in + gap_in) * j + w_in / 2) / size_in[0]
        figure.text(x, 1 - 0.04 / size_in[1], head, fontsize=8.5, ha="center", va="top", weight="bold")
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI)
    return Image.open(data).convert("RGB")


def show(axes: Any, panel: Panel) -> None:
    """Draw a panel with the true boxes of its label."""
    row = panel.row
    axes.axis("off")
    if panel.map_name is None or panel.overlay:
        axes.imshow(row.image_HW, cmap="gray", vmin=0, vmax=row.image_HW[row.breast_HW].max())
    if panel.map_name is not None:
        map_HW = row.maps[panel.map_name]
        inside = map_HW[row.breast_HW]
        low, high = float(inside.min()), float(inside.max())
        scaled_HW = np.clip((map_HW - low) / max(high - low, 1e-12), 0, 1)
        colour_HW4 = colormaps["viridis"](scaled_HW)
        colour_HW4[..., 3] = np.where(row.breast_HW, 0.1 + 0.55 * scaled_HW if panel.overlay else 1.0, 0.0)
        if not panel.overlay:
            colour_HW4[~row.breast_HW] = (0.9, 0.9, 0.9, 1.0)
        axes.imshow(colour_HW4)
    for box in row.boxes:
        corner = (box.x0 - 0.5, box.y0 - 0.5)
        frame = Rectangle(corner, box.x1 - box.x0, box.y1 - box.y0, fill=False, edgecolor="white", linewidth=1.1)
        frame.set_path_effects([withStroke(linewidth=2.4, foreground="black")])
        axes.add_patch(frame)
    axes.text(0, 1.01, panel.note, fontsize=8, va="bottom", transform=axes.transAxes)


def words(label: str) -> str:
    """A label as one reads it."""
    return label.replace("_", " ")


def beside(parts: Sequence[Image.Image], gap_px: int = 30) -> Image.Image:
    """Pictures in a row, their upper edges aligned."""
    width = sum(part.width for part in parts) + gap_px * (len(parts) - 1)
    whole = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    x = 0
    for part in parts:
        whole.paste(part, (x, 0))
        x += part.width + gap_px
    return whole


def write(whole: Image.Image, out: Path) -> None:
    """A JPEG: these are photographs, whose PNG would be four times as large."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.save(out, quality=88)
    print(f"{out}: {whole.width} x {whole.height}, {out.stat().st_size / 1e3:.0f} kB")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, open the runs, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("result", "encoder", "compare"))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--names", nargs=2, default=("FPN-AbMIL", "FPN-SetTrans"), help="of the compared runs")
    parser.add_argument("--out", type=Path, help="JPEG (default: in docs/images), or folder, to write")
    args = parser.parse_args(argv)
    if args.what == "encoder":
        write_encoder(args.runs[0], args.out or Path("weights") / args.runs[0].name)
        return
    runs = [open_run(folder) for folder in args.runs]
    if args.what == "result":
        result(runs[0], args.out or IMAGES / "result.jpg")
    else:
        compare(runs, args.names, args.out or IMAGES / "abmil_settrans.jpg")


if __name__ == "__main__":
    main()
