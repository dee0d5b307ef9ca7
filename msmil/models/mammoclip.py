"""The image encoders of Mammo-CLIP as timm models: same parameters, same padding, same numbers.

Legend: M images or tiles, C channels, H W pixels.

Mammo-CLIP's EfficientNets (which FPN-MIL builds upon) pad their strided convolutions as TensorFlow would for an input
of 260 (B2) or 456 (B5) pixels, whatever the input. Neither of timm's variants does that: `tf_efficientnet_*` pad for
the input they get, `efficientnet_*` symmetrically. The difference shifts the grid by a pixel per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional

Pad = tuple[int, int, int, int]  # left, right, top, bottom
_FORWARD: Final = (0, 1, 0, 1)


@dataclass(frozen=True)
class PublishedEncoder:
    """How a published encoder differs from timm's model of the same parameters.

    timm_name: the model; stage_lengths: blocks of its stages; pads: {convolution: its padding}, where it is not timm's.
    """

    timm_name: str
    stage_lengths: tuple[int, ...]
    pads: dict[str, Pad]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of timm.create_model: batch norm as TensorFlow's."""
        return {"bn_eps": 1e-3, "bn_momentum": 0.01}

    def apply_padding(self, net: nn.Module) -> None:
        """Give the convolutions of a freshly built timm model the published padding."""
        for name, pad in self.pads.items():
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, StaticPadConv2d(net.get_submodule(name), pad))


ENCODERS: Final[dict[str, PublishedEncoder]] = {
    "mammoclip_b2": PublishedEncoder(
        "efficientnet_b2", (2, 3, 3, 4, 4, 5, 2), {"conv_stem": _FORWARD, "blocks.1.0.conv_dw": _FORWARD}
    ),
    "mammoclip_b5": PublishedEncoder(
        "efficientnet_b5",
        (3, 5, 5, 7, 7, 9, 3),
        {"conv_stem": _FORWARD, "blocks.1.0.conv_dw": _FORWARD, "blocks.2.0.conv_dw": (1, 2, 1, 2)},
    ),
}


class StaticPadConv2d(nn.Conv2d):
    """A convolution with zeros of fixed widths before it, one per side; takes over the parameters of `conv`."""

    def __init__(self, conv: nn.Module, pad: Pad) -> None:
        assert isinstance(conv, nn.Conv2d)
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.pad = pad

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """[M, C, H, W] -> the convolution of the padded image."""
        return super().forward(functional.pad(x_MCHW, self.pad))
