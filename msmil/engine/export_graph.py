"""The graph of inference: stored images -> probabilities and attention, for programs that have no msmil.

B images, H W pixels, N tiles, I instances of one scale, S scales, K labels.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from msmil.bags.build import BagMaker
from msmil.bags.normalise import to_unit
from msmil.bags.tiling import padded_size
from msmil.config import Config
from msmil.config_checks import tile_sizes
from msmil.models.mil import MILModel
from msmil.types import Bag, BagOutput
from shards.errors import UserError

Format = Literal["torch-export", "onnx"]
Outputs = Mapping[str, Tensor]

INPUT: Final = "image_B1HW"
_TRACED_BATCH: Final = 2
_VERIFIED_BATCHES: Final = (1, 3)
_LARGEST_DIFFERENCE: Final = 1e-3  # of an output's largest value; another library's sums differ by 1e-6 or so


@dataclass(frozen=True)
class StoredImages:
    """What a graph takes: images as `msmil pack` stores them."""

    height_px: int
    width_px: int
    dtype: str


class InferenceGraph(nn.Module):
    """Normalisation, padding, tiling and the network as one module, in fp32.

    Called on image_B1HW (uint8 or uint16, as stored) it gives, by name: probability_BK, logit_BK; scale_logit_BSK
    where scales have heads; scale_weight_BKS where scales are weighed; per scale attention_<scale>_BKI (of nested MIL
    over regions, inner_attention_<scale>_BKNI inside them); pad_left_B and pad_top_B, the black pixels that were put
    left of and above an image.
    """

    def __init__(self, config: Config, network: MILModel, images: StoredImages) -> None:
        super().__init__()
        self.network = network
        self.images = images
        self.bag_config = config.bags
        sizes = tile_sizes(config.model)
        self._bags = BagMaker(config.bags, in_channels=config.model.in_channels, seed=0, sizes=sizes)

    def forward(self, image_B1HW: Tensor) -> dict[str, Tensor]:
        """Everything about a batch of images."""
        bag = self.bag(image_B1HW)
        output: BagOutput = self.network(bag.tiles_BNCPP)
        found = {"probability_BK": output.logit_BK.sigmoid(), "logit_BK": output.logit_BK}
        if output.scale_logit_SBK is not None:
            found["scale_logit_BSK"] = output.scale_logit_SBK.transpose(0, 1)
        if output.scale_weight_BKS is not None:
            found["scale_weight_BKS"] = output.scale_weight_BKS
        found |= {f"attention_{s}_BKI": x for s, x in (output.attention or {}).items()}
        found |= {f"inner_attention_{s}_BKNI": x for s, x in (output.inner_attention or {}).items()}
        found |= {"pad_left_B": bag.pad_left_B, "pad_top_B": bag.pad_top_B}
        return {name: x.contiguous() for name, x in found.items()}

    def bag(self, image_B1HW: Tensor) -> Bag:
        """What the network is called on."""
        return self._bags.of_unit(to_unit(image_B1HW))


def example_images(images: StoredImages, batch: int) -> Tensor:
    """Made-up images [B, 1, H, W]: a bright breast on one side or the other, with noise."""
    height, width = images.height_px, images.width_px
    generator = torch.Generator().manual_seed(batch)
    x_B1HW = torch.rand(batch, 1, height, width, generator=generator) * 0.8 + 0.1
    x_B1HW[..., width // 2 :] *= (torch.arange(batch) % 2)[:, None, None, None]
    x_B1HW[::2, :, : height // 3] = 0
    dtype = getattr(torch, images.dtype)
    return (x_B1HW * (255 if dtype == torch.uint8 else 65535)).to(torch.int32).to(dtype)


@dataclass(frozen=True)
class Writer:
    """How a format is written: its file, what it needs beside torch, and the function, which gives the graph back."""

    file: str
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path, str], Callable[[Tensor], Outputs]]


def describe(graph: InferenceGraph) -> dict[str, Any]:
    """What one needs to feed a graph, and to read what it gives."""
    images = graph.images
    with torch.no_grad():
        outputs = graph(example_images(images, 1))
        bag = graph.bag(example_images(images, 1))
    places = {str(s): bag.of_scale(s)[1].tolist() for s in graph.network.scales}
    padded_hw = padded_size(images.height_px, images.width_px, graph.bag_config)
    return {
        "input": {"name": INPUT, "dtype": images.dtype, "shape": ["B", 1, images.height_px, images.width_px]},
        "inside": "scaling to 0..1, local contrast, mean and standard deviation, black padding, tiles: nothing is left",
        "outputs": {
            name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": ["B", *x.shape[1:]]}
            for name, x in outputs.items()
        },
        "scales": list(graph.network.scales),
        "padded_hw_px": list(padded_hw),
        "tile_origins_xy_px": places,
        "order_of_instances": "by tile, in a tile by row and column",
    }


def check_available(formats: Sequence[Format]) -> None:
    """Refuse formats whose packages are not installed.

    Raises:
        UserError: naming the first that is missing.
    """
    for name in formats:
        for package in WRITERS[name].needs:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--format {name} needs {package}", fix="pip install 'msmil[export]'")


def written_and_verified(graph: InferenceGraph, name: Format, folder: Path, about: str) -> float:
    """Write a graph into a folder, read it again, and compare it with the model on other batch sizes.

    Returns:
        The largest difference, in units of an output's largest value.

    Raises:
        UserError: the graph cannot be expressed; it gives other numbers than the model.
    """
    writer = WRITERS[name]
    with torch.no_grad(), _silent():
        program = _traced(graph)
        try:
            run = writer.write(program, folder / writer.file, about)
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            raise _inexpressible(name, error) from None
        verified = [example_images(graph.images, batch) for batch in _VERIFIED_BATCHES]
        differences = [_difference(run(image), graph(image)) for image in verified]
    largest = max(differences)
    if not largest <= _LARGEST_DIFFERENCE:
        thing = f"the {name} graph gives other numbers than the model (they differ by {largest:.1e} of an output)"
        raise UserError(thing, fix="export without --format, and call the model through msmil")
    return largest


def _traced(graph: InferenceGraph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        return torch.export.export(
            graph, (example_images(graph.images, _TRACED_BATCH),), dynamic_shapes={INPUT: {0: batch}}, strict=False
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise _inexpressible("torch-export", error) from None


def _inexpressible(name: str, error: Exception) -> UserError:
    first = " ".join(str(error).split())[:200]
    thing = f"this model cannot be expressed as {name} ({type(error).__name__}: {first})"
    other = "the other --format, or none: " if name == "onnx" else ""
    return UserError(thing, fix=f"export with {other}the weights alone serve msmil")


def _difference(ours: Outputs, eager: Outputs) -> float:
    assert list(ours) == list(eager), f"{list(ours)} are no {list(eager)}"
    found = 0.0
    for name, expected in eager.items():
        assert ours[name].shape == expected.shape, f"{name}: {ours[name].shape} is not {expected.shape}"
        difference = (ours[name].double() - expected.double()).abs().max()
        found = max(found, float(difference / expected.double().abs().max().clamp_min(1e-12)))
    return found


def _write_torch_export(program: torch.export.ExportedProgram, file: Path, about: str) -> Callable[[Tensor], Outputs]:
    torch.export.save(program, file, extra_files={"msmil.json": about})
    loaded: Callable[[Tensor], Outputs] = torch.export.load(file).module()
    return loaded


def _write_onnx(program: torch.export.ExportedProgram, file: Path, about: str) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    names = list(program.call_spec.out_spec.context)
    written = torch.onnx.export(program, input_names=[INPUT], output_names=names, dynamo=True, verbose=False)
    assert written is not None
    written.model.metadata_props["msmil"] = about
    written.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(image_B1HW: Tensor) -> Outputs:
        arrays = session.run(names, {INPUT: image_B1HW.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


@contextmanager
def _silent() -> Iterator[None]:
    """Exporters think aloud; what matters is compared in the end."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


WRITERS: Final[dict[Format, Writer]] = {
    "torch-export": Writer("model.pt2", (), _write_torch_export),
    "onnx": Writer("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx),
}
