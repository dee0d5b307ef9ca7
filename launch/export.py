"""`msmil export RUN`: the weights of a run for others, and on request its graph of inference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launch.arguments import add_json
from launch.commands import Commands

_FORMATS = ("torch-export", "onnx")


def add_parser(commands: Commands) -> None:
    """Add `msmil export`."""
    parser = commands.add_parser(
        "export",
        help="the weights of a run for others, as safetensors, torch.export or ONNX",
        description="Write the best weights of a run (the averaged ones, where it has them) with its configuration: a "
        "folder that `msmil evaluate` and model.weights take. --format adds the graph of inference, from stored "
        "images to probabilities and attention, with any batch size; it is compared with the model before it is kept.",
        examples=(
            "msmil export runs/demo",
            "msmil export runs/demo --format onnx --format torch-export --out exports/demo",
            "msmil export weights/fpn_abmil --format onnx --shards data/vindr/shards --out exports/fpn_abmil",
        ),
    )
    add = parser.add_argument
    add("folder", metavar="RUN", type=Path, help="run folder, or one that `msmil convert` wrote")
    add("--out", metavar="DIR", type=Path, help="folder to write; an export in it is replaced (default: RUN/export)")
    add("--checkpoint", default="best", metavar="NAME", help="best, latest or step_N (default: best)")
    add(
        "--format",
        action="append",
        choices=_FORMATS,
        default=[],
        help="also the graph: model.pt2 or model.onnx; may be given twice (default: none)",
    )
    shards = "packed data whose images the graph takes (default: those that the run was trained on)"
    add("--shards", metavar="DIR", help=shards)
    add_json(parser, "what was written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from msmil.engine.export import export
    from msmil.engine.run_folder import RunFolder

    out = args.out or args.folder / "export"
    formats = list(dict.fromkeys(args.format))
    about = export(RunFolder(args.folder), out, checkpoint=args.checkpoint, formats=formats, shards=args.shards)
    if args.json:
        print(json.dumps(about, indent=2, allow_nan=False))
        return 0
    print(f"{out}: weights of {about.get('checkpoint', args.folder)}, config.yaml, export.json")
    for name, difference in about.get("files", {}).items():
        print(f"{out / name}: differs from the model by at most {difference:.1e} of an output's largest value")
    return 0
