"""Where in the image a cell of a map really looks.

Cell i of a map of stride s is commonly drawn at (i + 0.5) s. A convolution with stride 2 and symmetric padding is
centred on pixel 2 i of its input instead, so that a chain of them looks at i s + 0.5; pooling over 2 x 2 keeps
(i + 0.5) s; residual networks mix both. This is why the centre is measured on the network itself.

Legend: B probes, C channels, D channels of a map, H W pixels, L pixels along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from msmil.models.mil import MILModel
from msmil.models.pyramid import FeaturePyramid

CellOffsets = Mapping[int, tuple[float, float]]
"""{stride: (dy, dx)}: pixels from (i + 0.5) * stride to the point that cell i looks at."""

_PROBES: Final = 8  # images of noise, each with a random direction in the channels of every map
_PROBE_CELLS: Final = 8  # side of a probe in cells of the coarsest map
_WINDOW_CELLS: Final = 3  # likewise: how far from the centre pixels count; squeeze-excitation sees all of the image
_ROUNDS: Final = 20  # of moving the window to the centroid; the movement shrinks geometrically


def cell_centres(network: MILModel, tile_hw: tuple[int, int]) -> dict[int, tuple[float, float]]:
    """{stride: (dy, dx) in pixels from (i + 0.5) * stride to the true centre of cell i}, for every scale.

    Args:
        network: in any mode and on any device; modes, `requires_grad` and `.grad` of its parameters stay as they are.
        tile_hw: height and width of its tiles in pixels (the padded image's in `image` mode).

    The centre is the centroid of |d map[:, cell] . r / d image|^2, with r a random direction and the image noise, over
    the pixels around it. Where finer cells lie differently within a coarser one (the pyramid's nearest upsampling),
    this is the mean over them. The same weights give the same offsets on one kind of device.

    Where an instance is a tile it stands for all of its square: its offset is 0.

    A scale beyond the pyramid's coarsest map takes every k-th cell of that map: its offset follows exactly, as
    offset_last - (stride - stride_last) / 2.
    """
    if network.pyramid is None:
        return dict.fromkeys(network.scales, (0.0, 0.0))
    strides = network.pyramid.strides
    last = strides[-1]
    energies: dict[int, list[_Energy]] = {stride: [] for stride in strides}
    with torch.inference_mode(False), torch.enable_grad(), _evaluating(network):
        probe_hw = _probe_hw(network, network.pyramid, tile_hw)
        for probe in range(_PROBES):
            for stride, energy in _energies(network, network.pyramid, probe_hw, probe):
                energies[stride].append(energy)
    offsets = {stride: _centroid(energies[stride], stride, _WINDOW_CELLS * last) for stride in strides}
    dy, dx = offsets[last]
    for stride in network.scales[len(strides) :]:
        offsets[stride] = (dy - (stride - last) / 2, dx - (stride - last) / 2)
    return offsets


class _Energy(NamedTuple):
    """Each pixel's share in the squared gradient of one cell, and the cell."""

    energy_HW: Tensor
    cell_yx: tuple[int, int]


def _probe_hw(network: MILModel, pyramid: FeaturePyramid, tile_hw: tuple[int, int]) -> tuple[int, int]:
    """Small, or as large as the tiles where the backbone takes only these (window attention, position embeddings)."""
    side = _PROBE_CELLS * pyramid.strides[-1]
    image_1CHW = torch.zeros(1, network.in_channels, side, side, device=next(network.parameters()).device)
    try:
        with torch.no_grad():
            network.backbone(image_1CHW)
    except (AssertionError, RuntimeError, ValueError):
        return tile_hw
    return side, side


def _energies(
    network: MILModel, pyramid: FeaturePyramid, probe_hw: tuple[int, int], probe: int
) -> Iterator[tuple[int, _Energy]]:
    """Per stride the energy of one of the cells that fill the central cell of the coarsest map."""
    device, last = next(network.parameters()).device, pyramid.strides[-1]
    image_1CHW = _noise((1, network.in_channels, *probe_hw), device, seed=probe).requires_grad_()
    levels = pyramid.levels(network.backbone(image_1CHW))
    for stride in pyramid.strides:
        map_Dhw = levels[stride][0]
        count = last // stride
        within = probe % count if count <= _PROBES else probe * count // _PROBES
        y, x = (side // count // 2 * count + within for side in map_Dhw.shape[1:])
        direction_D = _noise((len(map_Dhw),), device, seed=_PROBES * stride + probe)
        seen = (map_Dhw[:, y, x] * direction_D).sum()
        (gradient_1CHW,) = torch.autograd.grad(seen, image_1CHW, retain_graph=True)
        energy_HW = gradient_1CHW[0].double().square().sum(0)
        yield stride, _Energy(energy_HW / energy_HW.sum(), (y, x))


def _centroid(energies: Sequence[_Energy], stride: int, reach_px: int) -> tuple[float, float]:
    """Centroid relative to (cell + 0.5) * stride within a window that is centred on it (mean shift).

    A uniform background within a centred window does not move the centroid; with the window at a fixed place it would.
    """
    energy_BHW = torch.stack([energy.energy_HW for energy in energies])
    dy_BH = _from_centre([energy.cell_yx[0] for energy in energies], stride, energy_BHW[0, :, 0])
    dx_BW = _from_centre([energy.cell_yx[1] for energy in energies], stride, energy_BHW[0, 0])
    dy = dx = -stride / 4  # between the two rules
    for _ in range(_ROUNDS):
        inside_BHW = ((dy_BH - dy).abs() <= reach_px)[:, :, None] & ((dx_BW - dx).abs() <= reach_px)[:, None, :]
        near_BHW = energy_BHW * inside_BHW
        total = near_BHW.sum()
        dy = float((near_BHW.sum(2) * dy_BH).sum() / total)
        dx = float((near_BHW.sum(1) * dx_BW).sum() / total)
    return dy, dx


def _from_centre(cells: Sequence[int], stride: int, like_L: Tensor) -> Tensor:
    """Distance in pixels of every pixel's centre from (cell + 0.5) * stride, float64 [B, L]."""
    pixel_L = torch.arange(len(like_L), device=like_L.device, dtype=torch.float64)
    cell_B = torch.tensor(cells, device=like_L.device, dtype=torch.float64)
    return pixel_L + 0.5 - (cell_B[:, None] + 0.5) * stride


def _noise(shape: tuple[int, ...], device: torch.device, *, seed: int) -> Tensor:
    """Standard normal float32, drawn on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
