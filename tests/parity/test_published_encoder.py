"""The published encoders: ours compute what they compute, at every endpoint.

`pytest tests/parity -s` prints the largest differences.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msmil.models.backbone import Backbone
from msmil.models.published.convert import convert
from tests.parity.published import golden, padded_image_HW, published_state, tiny_bags

pytestmark = pytest.mark.slow

STAGES = {"mammoclip_b2": (2, 3, 3, 4, 4, 5, 2), "mammoclip_b5": (3, 5, 5, 7, 7, 9, 3)}
PIXELS = {"mammoclip_b2": 260, "mammoclip_b5": 456}  # the input that the published padding is computed for
STRIDES = (1, 2, 2, 2, 1, 2, 1)
BOUND = 1e-4


@functools.cache
def backbone(name: str, *, in_channels: int = 3) -> Backbone:
    """Our backbone with the converted encoder, in float64."""
    tensors = {
        f"image_encoder.{k}": v.double() if v.is_floating_point() else v for k, v in published_state(name).items()
    }
    converted = convert({"model": tensors}, config={"in_channels": in_channels})
    net = converted.backbone
    net.load_state_dict({k.removeprefix("backbone."): v for k, v in converted.state.items()}, assign=True)
    return net.eval()


def endpoints(net: Backbone, image_MCHW: Tensor) -> dict[str, Tensor]:
    """What the published endpoints are called -> our maps there."""
    found: dict[str, Tensor] = {}
    named = {
        "stem": net.net.get_submodule("bn1"),
        **{f"stage{i}": b for i, b in enumerate(net.net.get_submodule("blocks"))},
    }
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out, name=name: found.update({name: out}))
        for name, module in named.items()
    ]
    with torch.inference_mode():
        maps = net(image_MCHW)
    for hook in hooks:
        hook.remove()
    assert torch.equal(maps[0], found["stage4"])
    assert torch.equal(maps[1], found["stage6"])
    return found


@functools.cache
def b2_endpoints(case: str) -> dict[str, Tensor]:
    """Of our B2, and the head of the released file behind it, which our backbone leaves out."""
    if case == "p512":
        image_MCHW = padded_image_HW()[None, None, 512:1024, 0:512].expand(-1, 3, -1, -1)
    else:
        image_MCHW = tiny_bags()[0]
    found = endpoints(copy.deepcopy(backbone("mammoclip_b2")).float(), image_MCHW.contiguous())
    tensors = published_state("mammoclip_b2")
    found["head"] = _swish(_norm(functional.conv2d(found["stage6"], tensors["_conv_head.weight"]), tensors, "_bn1"))
    return found


@pytest.mark.parametrize("endpoint", ["stem", *(f"stage{i}" for i in range(7)), "head"])
@pytest.mark.parametrize("case", ["p512", "p128"])
def test_b2_computes_what_the_published_encoder_computes(case: str, endpoint: str) -> None:
    ours, array = b2_endpoints(case)[endpoint].double(), golden("encoder_b2")
    published = {part: torch.from_numpy(array[f"{case}/{endpoint}_{part}"]).double() for part in _PARTS}
    std = float(published["std"].square().mean().sqrt())  # within the channels: not larger than that of the endpoint
    worst = max(float((cut(ours) - published[part]).abs().max()) for part, cut in _PARTS.items())
    print(f"\nencoder_b2 {case} {endpoint}: max difference {worst:.1e}, std {std:.3g}, share {worst / std:.1e}", end="")
    assert worst <= BOUND * std


_PARTS = {
    "mean": lambda x: x.mean((2, 3)),
    "std": lambda x: x.std((2, 3), correction=0),
    "slice": lambda x: x[:, :8, :6, :6],
    "slice_end": lambda x: x[:, -8:, -4:, -4:],
}


@pytest.mark.parametrize("name", ["mammoclip_b2", "mammoclip_b5"])
def test_both_encoders_are_what_a_plain_computation_gives(name: str) -> None:
    """Convolutions and norms written out, with the padding that TensorFlow's rule gives for the published input."""
    image_MCHW = tiny_bags()[0, :1, :, :64, :64].double()
    plain = dict(plain_endpoints(published_state(name), STAGES[name], PIXELS[name], image_MCHW))
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, BOUND)):
        ours = endpoints(copy.deepcopy(backbone(name)).to(dtype), image_MCHW.to(dtype))
        for endpoint, expected in plain.items():
            share = float((ours[endpoint].double() - expected).abs().max() / expected.std())
            print(f"\n{name} {dtype} {endpoint}: max difference / std {share:.1e}", end="")
            assert share <= bound


def test_one_channel_gives_what_three_equal_ones_give() -> None:
    image_MCHW = tiny_bags()[0, :1, :, :64, :64].double()
    three = backbone("mammoclip_b2")(image_MCHW)
    one = backbone("mammoclip_b2", in_channels=1)(image_MCHW[:, :1])
    for a, b in zip(three, one, strict=True):
        np.testing.assert_allclose(b.detach(), a.detach(), rtol=1e-10, atol=1e-10 * float(a.detach().std()))


def plain_endpoints(
    tensors: dict[str, Tensor], stages: tuple[int, ...], pixels: int, image_MCHW: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """An EfficientNet in float64 from its published state dict, layer by layer."""
    tensors = {key: value.double() for key, value in tensors.items()}
    x, pixels = _strided(image_MCHW, tensors["_conv_stem.weight"], 2, pixels)
    x = _swish(_norm(x, tensors, "_bn0"))
    yield "stem", x
    index = 0
    for stage, (blocks, stride) in enumerate(zip(stages, STRIDES, strict=True)):
        for block in range(blocks):
            x, pixels = _plain_block(x, tensors, f"_blocks.{index}.", stride if block == 0 else 1, pixels)
            index += 1
        yield f"stage{stage}", x


def _plain_block(x: Tensor, tensors: dict[str, Tensor], at: str, stride: int, pixels: int) -> tuple[Tensor, int]:
    before = x
    if f"{at}_expand_conv.weight" in tensors:
        x = _swish(_norm(functional.conv2d(x, tensors[f"{at}_expand_conv.weight"]), tensors, f"{at}_bn0"))
    x, pixels = _strided(x, tensors[f"{at}_depthwise_conv.weight"], stride, pixels, groups=x.shape[1])
    x = _swish(_norm(x, tensors, f"{at}_bn1"))
    squeezed = x.mean((2, 3), keepdim=True)
    for layer in ("_se_reduce", "_se_expand"):
        squeezed = functional.conv2d(squeezed, tensors[f"{at}{layer}.weight"], tensors[f"{at}{layer}.bias"])
        squeezed = _swish(squeezed) if layer == "_se_reduce" else torch.sigmoid(squeezed)
    x = _norm(functional.conv2d(x * squeezed, tensors[f"{at}_project_conv.weight"]), tensors, f"{at}_bn2")
    return x + before if stride == 1 and x.shape == before.shape else x, pixels


def _strided(x: Tensor, weight: Tensor, stride: int, pixels: int, *, groups: int = 1) -> tuple[Tensor, int]:
    """A convolution padded as TensorFlow pads for `pixels`, whatever the input; and the pixels it leaves."""
    kernel, left_over = weight.shape[-1], -(-pixels // stride)
    total = max((left_over - 1) * stride + kernel - pixels, 0)
    pad = (total // 2, total - total // 2)
    return functional.conv2d(functional.pad(x, pad + pad), weight, stride=stride, groups=groups), left_over


def _norm(x: Tensor, tensors: dict[str, Tensor], at: str) -> Tensor:
    mean, var, weight, bias = (
        tensors[f"{at}.{part}"].to(x.dtype)[:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-3).sqrt() * weight + bias


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
