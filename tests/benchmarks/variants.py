"""What each variant of the model costs against plain FPN-AbMIL, in one run: `python -m tests.benchmarks.variants`.

Forward and backward of a training step, time and peak memory per image, beside the ratio of the pixels that the
encoders see. A variant should not be slower than that ratio by more than 15 %; what lies behind the encoder (pyramid,
MIL, attention of set transformers above all) is measured alone, from what the encoder made before, and taken off first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from msmil.bags.build import BagMaker
from msmil.config import Config
from msmil.config_checks import tile_sizes
from msmil.config_io import load_config
from msmil.engine.pipeline import build_network
from msmil.models.backbone import freeze_statistics, set_trainable
from msmil.models.instances import Tiles
from msmil.models.mil import MILModel
from msmil.types import BagOutput

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
PLAIN = "mass_fpn_abmil"
ALLOWED = 1.15


@dataclass
class Variant:
    """A model with a batch of bags, and what was measured of it."""

    name: str
    network: MILModel
    tiles: Tiles
    images: int
    step_s: list[float] = field(default_factory=list)
    mil_s: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def pixels(self) -> int:
        """Pixels that the encoder sees, per image."""
        parts = [self.tiles] if isinstance(self.tiles, Tensor) else list(self.tiles.values())
        return sum(part[:, :, 0].numel() for part in parts) // self.images


def experiments() -> list[Path]:
    """Plain FPN-AbMIL first, then every experiment of the paper whose network is another one."""
    paper = EXPERIMENTS / "paper"
    found: list[tuple[Path, Config]] = []
    for file in (paper / f"{PLAIN}.yaml", *sorted(paper.glob("*.yaml"))):
        config = load_config(file)
        if not any((config.model, config.bags) == (known.model, known.bags) for _, known in found):
            found.append((file, config))
    return [file for file, _ in found]


def make_variant(
    file: Path, device: torch.device, *, stored_hw: tuple[int, int], images: int, backbone: str
) -> Variant:
    """The network of an experiment as it trains, and bags of random images."""
    config = load_config(file)
    model = replace(config.model, weights="", backbone=backbone or config.model.backbone)
    config = replace(config, model=model)
    torch.manual_seed(0)
    network = build_network(config, stored_hw, pretrained=False)
    freeze_statistics(network)
    set_trainable(network, "all" if backbone else config.train.trainable_blocks)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    bags = BagMaker(config.bags, in_channels=model.in_channels, seed=0, sizes=tile_sizes(model))
    image_B1HW = torch.randint(0, 256, (images, 1, *stored_hw), dtype=torch.uint8, device=device)
    return Variant(file.stem, network.train(), bags(image_B1HW, augment=None).tiles_BNCPP, images)


def step(variant: Variant, levels: dict[int, Tensor] | None = None) -> None:
    """Forward and backward of all heads, in the precision of the experiments; from `levels` without the encoder."""
    device = next(variant.network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output: BagOutput = variant.network(variant.tiles if levels is None else None, levels=levels)
    total = output.logit_BK.float().sum()
    if output.scale_logit_SBK is not None:
        total = total + output.scale_logit_SBK.float().sum()
    total.backward()
    for parameter in variant.network.parameters():
        parameter.grad = None


def step_behind_encoder(variant: Variant) -> Callable[[], None]:
    """The same step from what the encoder made of the tiles before."""
    with torch.no_grad():
        encoded = variant.network.encode(variant.tiles)
    levels = {
        level: part.x_MX.unflatten(0, part.bags_tiles).float().requires_grad_() for level, part in encoded.items()
    }
    return lambda: step(variant, levels)


def seconds(action: Callable[[], None], device: torch.device) -> float:
    """How long it takes, the device's work included. On a CPU its own processor time: what else runs does not count."""
    if device.type == "cpu":
        start_s = time.process_time()
        action()
        return time.process_time() - start_s
    torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    action()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def peak_memory_bytes(variant: Variant, device: torch.device) -> int:
    """On a GPU the peak of a step beyond weights and images; on a CPU the activations that wait for the backward."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(variant)
        return int(torch.cuda.max_memory_allocated(device) - before)
    held = {p.untyped_storage().data_ptr(): 0 for p in variant.network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(variant)
    return sum(held.values())


def measure(variants: Sequence[Variant], device: torch.device, rounds: int) -> None:
    """Measure all variants in turn, round by round, so that what else runs here meets them alike."""
    behind = {}
    for variant in variants:
        if device.type == "cuda":
            step(variant)  # the first one chooses algorithms
        variant.memory_bytes = peak_memory_bytes(variant, device)
        behind[variant.name] = step_behind_encoder(variant)
        behind[variant.name]()
    for _ in range(rounds):
        for variant in variants:
            variant.step_s.append(seconds(lambda: step(variant), device))  # noqa: B023 - called at once
            variant.mil_s.append(seconds(behind[variant.name], device))


def table(variants: Sequence[Variant]) -> str:
    """One line per variant; the first one is what the others are held against."""
    plain = variants[0]
    per_pixel = (median(plain.step_s) - median(plain.mil_s)) / plain.pixels
    lines = [
        f"{'variant':44} {'ms/image':>9} {'MIL ms':>7} {'MB/image':>9} {'pixels':>7} {'time':>6} {'time/pixels':>12}  "
        "(ratios to the first line; the last one without the MIL part)"
    ]
    for v in variants:
        step_ms, mil_ms = median(v.step_s) / v.images * 1e3, median(v.mil_s) / v.images * 1e3
        encoder = (median(v.step_s) - median(v.mil_s)) / v.pixels / per_pixel
        ratios = f"{v.pixels / plain.pixels:7.2f} {median(v.step_s) / median(plain.step_s):6.2f} {encoder:12.2f}"
        mark = "" if encoder <= ALLOWED else f"  slower than its pixels by more than {ALLOWED - 1:.0%}"
        lines.append(f"{v.name:44} {step_ms:9.0f} {mil_ms:7.0f} {v.memory_bytes / v.images / 1e6:9.0f} {ratios}{mark}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--height", type=int, default=1520, help="of stored images in pixels")
    parser.add_argument("--width", type=int, default=912)
    parser.add_argument("--images", type=int, default=1, help="bags of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="", help="another one, trained whole (default: the experiments' own)")
    parser.add_argument("--only", default="", help="variants whose name holds this text, beside plain FPN-AbMIL")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    files = [file for file in experiments() if file.stem == PLAIN or args.only in file.stem]
    size = (args.height, args.width)
    variants = [make_variant(f, device, stored_hw=size, images=args.images, backbone=args.backbone) for f in files]
    measure(variants, device, args.rounds)
    print(f"{torch.get_num_threads()} threads of CPU" if device.type == "cpu" else torch.cuda.get_device_name(device))
    print(table(variants))


if __name__ == "__main__":
    main()
