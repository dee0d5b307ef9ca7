"""Feature pyramid over the backbone's maps.

Legend: M images or tiles, D channels, h w size of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class FeaturePyramid(nn.Module):
    """Top-down feature pyramid (FPN-MIL, section "Multi-scale instances"; Lin et al. 2017).

    P_last' = lateral_last(C_last);  P_i' = lateral_i(C_i) + nearest(P_{i+1}', size of C_i);  P_i = refine_i(P_i').
    `lateral` is a 1x1 and `refine` a 3x3 convolution, both with bias, with no activation and no norm.

    Its levels are the strides of `scales` that the backbone has (published: 16 and 32): a stride of the backbone
    that `scales` leaves out takes no part, so the top-down path starts at the coarsest level named. Scales beyond
    that level are subsamplings of the refined coarsest map, P_last[:, :, ::k, ::k] (published: 128 from 32, k = 4).

    Args:
        scales: wanted strides, ascending.
        strides: the backbone's, ascending; the first ones of `scales`.
        channels: of the backbone's maps.
        dim: channels of every level.
    """

    def __init__(self, *, scales: Sequence[int], strides: Sequence[int], channels: Sequence[int], dim: int) -> None:
        super().__init__()
        assert tuple(scales[: len(strides)]) == tuple(strides)
        self.scales = tuple(scales)
        self.strides = tuple(strides)
        self.lateral = nn.ModuleDict({str(s): nn.Conv2d(c, dim, 1) for s, c in zip(strides, channels, strict=True)})
        self.refine = nn.ModuleDict({str(s): nn.Conv2d(dim, dim, 3, padding=1) for s in strides})

    def forward(self, maps: Sequence[Tensor]) -> dict[int, Tensor]:
        """Backbone maps, finest first -> {scale: map [M, dim, h, w]}, finest first."""
        merged: list[Tensor] = []
        for stride, feature in reversed(list(zip(self.strides, maps, strict=True))):
            lateral = self.lateral[str(stride)](feature)
            if merged:
                lateral = lateral + functional.interpolate(merged[-1], size=lateral.shape[-2:], mode="nearest")
            merged.append(lateral)
        levels = {s: self.refine[str(s)](m) for s, m in zip(self.strides, reversed(merged), strict=True)}
        coarsest = self.strides[-1]
        for scale in self.scales[len(self.strides) :]:
            # kernel 1: a subsampling that keeps the memory format, also on maps smaller than the step
            levels[scale] = functional.max_pool2d(levels[coarsest], kernel_size=1, stride=scale // coarsest)
        return levels
