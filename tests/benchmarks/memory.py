"""What a training step of the published recipes holds in memory, computed: `python -m tests.benchmarks.memory`.

A step (forward and backward) of each recipe is gone through with tensors that have shapes and no numbers. Whenever an
operation returns a tensor its bytes are counted, and taken off when it is freed. The peak is what is alive at the same
time at the worst moment: weights, Adam's moments, the images, activations that wait for the backward pass, gradients.
A GPU needs more, which is not in here: workspaces of its libraries, what lies between the tensors, its context.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from msmil.bags.tiling import padded_size, tile_hw, tile_origins
from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine.bf16 import compute_bf16
from msmil.engine.pipeline import build_network
from msmil.models.backbone import freeze_statistics, set_gradient_checkpointing, set_trainable
from msmil.models.mil import MILModel
from msmil.types import BagOutput

EXPERIMENTS: Final = Path(__file__).parents[2] / "configs" / "experiment"
STORED_HW: Final = (1520, 912)
IMAGES: Final = (1, 8)
MOMENTS: Final = 2  # of AdamW


@dataclass(frozen=True)
class Row:
    """A recipe, and what of it is changed."""

    name: str
    file: str
    blocks: Literal["all"] | int = 8
    checkpointing: bool = False
    instances: Literal["image", "tiles"] = "image"
    from_features: bool = False


_ABMIL, _SETTRANS = "vindr_mass_fpn_abmil", "vindr_calcification_fpn_settrans"
ROWS: Final = (
    Row("FPN-AbMIL, last 8 blocks train (its recipe)", _ABMIL),
    Row("the same, gradient checkpointing", _ABMIL, checkpointing=True),
    Row("the same, tiles of 512", _ABMIL, instances="tiles"),
    Row("FPN-AbMIL, all blocks train", _ABMIL, "all"),
    Row("the same, gradient checkpointing", _ABMIL, "all", checkpointing=True),
    Row("the same, tiles of 512", _ABMIL, "all", instances="tiles"),
    Row("FPN-SetTrans, last 8 blocks train (its recipe)", _SETTRANS),
    Row("all ten labels, all blocks train (its recipe)", "vindr_multilabel", "all"),
    Row("FPN-AbMIL from stored features", f"{_ABMIL}_offline", 0, instances="tiles", from_features=True),
)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now_bytes -= num_bytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


def step_bytes(
    config: Config, stored_hw: tuple[int, int], images: Sequence[int], *, from_features: bool = False
) -> list[int]:
    """Bytes alive at the worst moment of a training step, for each number of images on one GPU."""
    with torch.device("meta"):
        network = network_as_trained(config, stored_hw)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        return [peak_bytes(network, config, stored_hw, n, from_features=from_features) for n in images]


def network_as_trained(config: Config, stored_hw: tuple[int, int]) -> MILModel:
    """The network, frozen and laid out as the training has it."""
    network = build_network(config, stored_hw, pretrained=False)
    freeze_statistics(network)
    set_trainable(network, 0 if config.train.encoder == "frozen" else config.train.trainable_blocks)
    if config.train.gradient_checkpointing:
        set_gradient_checkpointing(network)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return network.to(memory_format=memory_format).train()  # type: ignore[call-overload, no-any-return]


def peak_bytes(
    network: MILModel, config: Config, stored_hw: tuple[int, int], images: int, *, from_features: bool = False
) -> int:
    """The same of a network that exists, with numbers or without."""
    compute_bf16(natively=True)  # what a GPU keeps, not a CPU without instructions for it
    with Alive() as alive:
        for tensor in network.state_dict().values():
            alive.count(tensor)
        beside = [torch.empty_like(p) for p in network.parameters() if p.requires_grad for _ in range(MOMENTS)]
        if config.train.ema_decay:
            beside += [torch.empty_like(p) for p in network.parameters()]
        model_input = inputs(network, config, stored_hw, images, from_features=from_features)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            output: BagOutput = network(**model_input)
        loss = output.logit_BK.float().sum()
        if output.scale_logit_SBK is not None:
            loss = loss + output.scale_logit_SBK.float().sum()
        del output
        loss.backward()
    network.zero_grad()
    return alive.peak_bytes


def inputs(
    network: MILModel, config: Config, stored_hw: tuple[int, int], images: int, *, from_features: bool
) -> Mapping[str, Any]:
    """What the model is called on: tiles, or stored maps of them."""
    padded_hw = padded_size(*stored_hw, config.bags)
    tiles, (height, width) = len(tile_origins(padded_hw, config.bags)), tile_hw(padded_hw, config.bags)
    if not from_features:
        return {"tiles_BNCPP": torch.empty(images, tiles, config.model.in_channels, height, width)}
    levels = {s: torch.empty(images, tiles, d, height // s, width // s) for s, d in network.levels.items()}
    return {"tiles_BNCPP": None, "levels": levels}


def config_of(row: Row) -> Config:
    """The recipe with the row's changes."""
    config = load_config(EXPERIMENTS / f"{row.file}.yaml")
    train = replace(config.train, gradient_checkpointing=row.checkpointing)
    if not row.from_features:
        train = replace(train, trainable_blocks=row.blocks)
    bags = replace(config.bags, instances=row.instances)
    return replace(config, model=replace(config.model, pretrained=False), bags=bags, train=train)


def fixed_bytes(config: Config, stored_hw: tuple[int, int]) -> int:
    """Weights (and averaged ones), and gradients and moments of those that train; all in fp32."""
    with torch.device("meta"):
        network = network_as_trained(config, stored_hw)
    own = 2 if config.train.ema_decay else 1
    parameters = list(network.parameters())
    return sum((own + (1 + MOMENTS) * p.requires_grad) * p.numel() * p.element_size() for p in parameters)


def markdown(rows: Sequence[Row], images: Sequence[int]) -> str:
    """A table of gigabytes (10^9 bytes)."""
    head = ["per GPU, 1520 x 912 pixels, bf16", "weights, gradients, moments"]
    head += [f"{n} image{'s' * (n > 1)}" for n in images]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---' * (len(head) - 1)}|"]
    for row in rows:
        config = config_of(row)
        cells = [row.name, _gb(fixed_bytes(config, STORED_HW))]
        cells += [_gb(n) for n in step_bytes(config, STORED_HW, images, from_features=row.from_features)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="per GPU and micro-step")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    args = parser.parse_args(argv)
    print(markdown([row for row in ROWS if args.only in row.name], args.images))


if __name__ == "__main__":
    main()
