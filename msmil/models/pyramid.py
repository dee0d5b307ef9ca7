"""Feature pyramid over the backbone's maps.

Legend: M images or tiles, D channels, h w size of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional


class FeaturePyramid(nn.Module):
    """Top-down feature pyramid (FPN-MIL, section "Multi-scale instances"; Lin et al. 2017).

    P_last' = lateral_last(C_last);  P_i' = lateral_i(C_i) + upsample(P_{i+1}', size of C_i);  P_i = refine_i(P_i').
    `lateral` is a 1x1 and `refine` a 3x3 convolution, with no activation; both with bias and no norm, or without bias
    and followed by one GroupNorm of one group that all these convolutions share. Without the top-down path (the
    backbone pyramid) P_i' = lateral_i(C_i) everywhere.

    Its levels are the strides of `scales` that the backbone has (published: 16 and 32): a stride of the backbone
    that `scales` leaves out takes no part, so the top-down path starts at the coarsest level named. Scales beyond
    that level are subsamplings of the refined coarsest map, P_last[:, :, ::k, ::k] (published: 128 from 32, k = 4).

    Args:
        scales: wanted strides, ascending.
        strides: the backbone's, ascending; the first ones of `scales`.
        channels: of the backbone's maps.
        dim: channels of every level.
        top_down: add the coarser levels to the finer ones.
        upsample: how a coarser level is brought to a finer one's size (bilinear: corners not aligned).
        norm: the shared GroupNorm.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        dim: int,
        top_down: bool = True,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        norm: bool = False,
    ) -> None:
        super().__init__()
        assert tuple(scales[: len(strides)]) == tuple(strides)
        self.scales = tuple(scales)
        self.strides = tuple(strides)
        self.top_down = top_down
        self.upsample = upsample
        offered = zip(strides, channels, strict=True)
        self.lateral = nn.ModuleDict({str(s): nn.Conv2d(c, dim, 1, bias=not norm) for s, c in offered})
        self.refine = nn.ModuleDict({str(s): nn.Conv2d(dim, dim, 3, padding=1, bias=not norm) for s in strides})
        self.norm = nn.GroupNorm(1, dim) if norm else nn.Identity()

    def levels(self, maps: Sequence[Tensor]) -> dict[int, Tensor]:
        """Backbone maps, finest first -> {scale: map [M, dim, h, w]}, finest first."""
        return dict(zip(self.scales, self(maps), strict=True))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps of `levels` in order (a list: what wraps modules, as ZeRO-3 does, understands no numbered dict)."""
        merged: list[Tensor] = []
        for stride, feature in reversed(list(zip(self.strides, maps, strict=True))):
            lateral = self.norm(self.lateral[str(stride)](feature))
            if merged and self.top_down:
                lateral = lateral + functional.interpolate(merged[-1], size=lateral.shape[-2:], mode=self.upsample)
            merged.append(lateral)
        if merged[0].device.type == "cpu":
            # for one channels_last image oneDNN's gradient of these weights takes four times as long
            merged = [level.contiguous() for level in merged]
        levels = {s: self.norm(self.refine[str(s)](m)) for s, m in zip(self.strides, reversed(merged), strict=True)}
        coarsest = self.strides[-1]
        for scale in self.scales[len(self.strides) :]:
            # kernel 1: a subsampling that keeps the memory format, also on maps smaller than the step
            levels[scale] = functional.max_pool2d(levels[coarsest], kernel_size=1, stride=scale // coarsest)
        return [levels[scale] for scale in self.scales]
