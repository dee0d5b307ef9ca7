"""What `msmil bench scaling` tells: measured worlds, projected ones, and what the loader and the file system must give.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from msmil.config import Config
from msmil.engine.bench.projection import (
    ENGINES,
    Links,
    Parameters,
    Reading,
    Step,
    cores_needed,
    project,
    read_bytes_per_s,
    sent_bytes,
    traffic,
)
from shards.files import human_bytes

if TYPE_CHECKING:
    from msmil.engine.bench.scaling import Measured

PROJECTED: Final = (8, 64, 512)


def report(
    config: Config,
    found: Sequence[Measured],
    parameters: Parameters,
    reading: Reading,
    *,
    links: Sequence[Links],
    gpus_per_node: int,
) -> dict[str, Any]:
    """All numbers, as JSON has them; `found` begins with one rank."""
    from msmil.engine.bench.scaling import engine_of

    one, engine, accumulation = found[0], engine_of(config), config.train.accumulation
    step = one.as_step()
    return {
        "engine": engine,
        "precision": config.train.precision,
        "accumulation": accumulation,
        "device": one.device,
        "threads": one.threads,
        "images_per_rank": one.images_per_rank,
        "measured": [
            asdict(world)
            | {
                "efficiency": world.images_per_s / (world.ranks * one.images_per_s),
                "sent_bytes": world.sent_bytes,
                "formula_bytes": sum(
                    sent_bytes(part.kind, part.payload_bytes, world.ranks)
                    for part in traffic(engine, parameters, accumulation)
                ),
                "lost_s": world.step_s - one.step_s,
            }
            for world in found
        ],
        "parameters": asdict(parameters),
        "links": [asdict(link) for link in links],
        "gpus_per_node": gpus_per_node,
        "projected": _projected(parameters, step, links, gpus_per_node, accumulation),
        "reading": asdict(reading)
        | {
            "images_per_s_of_a_rank": one.images_per_s,
            "cores_per_rank": cores_needed(reading, one.images_per_s),
            "bytes_per_s": {n: read_bytes_per_s(reading, n * one.images_per_s) for n in PROJECTED},
        },
    }


def _projected(
    parameters: Parameters, step: Step, links: Sequence[Links], gpus_per_node: int, accumulation: int
) -> list[dict[str, Any]]:
    rows = []
    for engine in ENGINES:
        for overlap in (True, False) if engine == "ddp" else (False,):
            for ranks in PROJECTED:
                each = {
                    link.name: asdict(
                        project(
                            engine,
                            parameters,
                            step,
                            link,
                            ranks=ranks,
                            gpus_per_node=gpus_per_node,
                            accumulation=accumulation,
                            overlap=overlap,
                        )
                    )
                    for link in links
                }
                rows.append({"engine": engine, "overlap": overlap, "ranks": ranks, "links": each})
    return rows


def tables(told: dict[str, Any]) -> str:
    """The report as text."""
    one, reading = told["measured"][0], told["reading"]
    head = (
        f"{told['images_per_rank']} images per rank and step, {told['engine']}, {told['precision']}, {told['device']}"
    )
    if told["device"] == "CPU":
        head += f", {told['threads']} threads per rank"
    lines = [head, "", *_table(_MEASURED, [_measured_row(world) for world in told["measured"]]), ""]
    lines += [
        f"projected from the step of one rank ({_ms(one['step_s'])} ms, of which the backward that DDP hides behind is "
        f"{_ms(one['backward_s'])} ms)",
        f"{told['gpus_per_node']} GPUs per machine; efficiency by links:",
        *(
            f"  {link['name']}: {link['gpu_bytes_per_s'] / 1e9:g} GB/s between GPUs, "
            f"{link['node_bytes_per_s'] / 1e9:g} GB/s between machines, {link['latency_s'] * 1e6:g} us a message"
            for link in told["links"]
        ),
        "",
    ]
    names = [link["name"] for link in told["links"]]
    rows = [_projected_row(row, names) for row in told["projected"]]
    lines += _table(["engine", "GPUs", "sent by a rank", *names], rows)
    lines += [
        "",
        f"reading: an image has {human_bytes(round(reading['image_bytes']))} and takes a core "
        f"{_ms(reading['decode_s'])} ms; a rank that uses {reading['images_per_s_of_a_rank']:.1f} images/s needs "
        f"{reading['cores_per_rank']:.1f} cores, and "
        + ", ".join(f"{n} need {human_bytes(round(rate))}/s" for n, rate in reading["bytes_per_s"].items()),
    ]
    return "\n".join(lines)


_MEASURED: Final = [
    "ranks", "images/s", "efficiency", "step ms", "sent by a rank", "by the formula", "alone ms", "lost ms",
]  # fmt: skip


def _measured_row(world: dict[str, Any]) -> list[str]:
    return [
        str(world["ranks"]),
        f"{world['images_per_s']:.2f}",
        f"{world['efficiency']:.0%}",
        _ms(world["step_s"]),
        human_bytes(round(world["sent_bytes"])),
        human_bytes(round(world["formula_bytes"])),
        _ms(world["alone_s"]),
        _ms(world["lost_s"]),
    ]


def _projected_row(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    engine = row["engine"] + (", nothing hidden" if row["engine"] == "ddp" and not row["overlap"] else "")
    sent = human_bytes(round(row["links"][names[0]]["sent_bytes"]))
    return [engine, str(row["ranks"]), sent, *(f"{row['links'][name]['efficiency']:.0%}" for name in names)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
