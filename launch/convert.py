"""`msmil convert IN OUT`: published weights into the form that training and evaluation start from."""

from __future__ import annotations

import argparse

from launch.arguments import add_overrides
from launch.commands import Commands
from msmil.config_io import overrides_to_dict


def add_parser(commands: Commands) -> None:
    """Add `msmil convert`."""
    parser = commands.add_parser(
        "convert",
        help="published weights (Mammo-CLIP, FPN-MIL) to start from",
        description="Convert a Mammo-CLIP encoder (.tar) or an FPN-MIL checkpoint (best_model.pth) to safetensors and "
        "config.yaml. The architecture is read from keys and shapes; what they do not tell comes from options "
        "(model.instance_encoder, model.scale_aggregator, model.encoder_heads, ..), else from the published defaults, "
        "which are named. Nothing in the file is executed.",
        examples=(
            "msmil convert b2-model-best-epoch-10.tar weights/mammoclip_b2",
            "msmil convert best_model.pth weights/fpn_abmil --encoder b2-model-best-epoch-10.tar data.labels=[Mass]",
            "msmil train configs/experiment/vindr_mass_fpn_abmil.yaml model.weights=weights/mammoclip_b2",
            "msmil evaluate weights/fpn_abmil --shards data/vindr/shards",
        ),
    )
    parser.add_argument("source", metavar="IN", help="downloaded checkpoint")
    parser.add_argument("folder", metavar="OUT", help="folder to write: model.safetensors, config.yaml, report.txt")
    parser.add_argument(
        "--encoder", metavar="FILE", help="Mammo-CLIP file, for checkpoints without an encoder (default: none)"
    )
    add_overrides(parser, "options for config.yaml")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what became of every key."""
    from msmil.models.published.folder import convert_to_folder

    config = overrides_to_dict(args.overrides)
    report = convert_to_folder(args.source, args.folder, encoder=args.encoder, config=config).report
    for word, value in report.assumed.items():
        print(f"published default taken: {word} = {value!r}")
    print(f"{args.folder}: {report.summary()}; every key is named in report.txt")
    return 0
