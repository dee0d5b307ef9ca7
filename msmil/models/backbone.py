"""A timm model as backbone, used by its feature contract.

Legend: M images or tiles, C channels, H W pixels, D channels of a map, h w its size.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, Self

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from msmil.models.mammoclip import ENCODERS
from msmil.models.timm_nets import create, drop_unused_stages, first_line, level_indices, with_drop_path
from shards.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHECKED: dict[str, frozenset[str]] = {}  # the parameters in use of every architecture that was built before
_NOT_BLOCKS = ("stem", "patch_embed", "downsample")  # timm's names of what lies before and between blocks


class Backbone(nn.Module):
    """Images -> one feature map per stride, finest first.

    net: the timm model; its parameters keep timm's names under `net.`.
    strides, channels: of the maps, by timm's `feature_info`, checked against the shapes the model really returns.
    architecture: all that these shapes depend on; each is checked once per process.

    What does not train runs in eval mode, whatever `train()` asks for. See `set_trainable` and
    `freeze_statistics`.
    """

    def __init__(
        self, net: nn.Module, *, name: str, in_channels: int, tile_hw: tuple[int, int], architecture: str
    ) -> None:
        super().__init__()
        info: Any = net.feature_info
        self.net = net
        self.name = name
        self.strides: tuple[int, ...] = tuple(info.reduction())
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.frozen_statistics = False
        self._channels_last_output = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        if architecture not in _CHECKED:
            _CHECKED[architecture] = self._check_contract(in_channels, tile_hw)
        self._used = _CHECKED[architecture]
        set_trainable_parameters(self, "all")

    def forward(self, image_MCHW: Tensor) -> list[Tensor]:
        """Maps [M, D, H / stride, W / stride], one per stride."""
        return self._maps(self.net(image_MCHW))

    def train(self, mode: bool = True) -> Self:
        """Training mode for what trains; frozen modules, and frozen statistics, stay in eval mode."""
        super().train(mode)
        for module in self.net.modules():
            parameters = list(module.parameters())
            frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
            if frozen or (self.frozen_statistics and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def used_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) in forward order of those that the wanted maps depend on."""
        return [(name, p) for name, p in self.net.named_parameters() if name in self._used]

    def _maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self._channels_last_output:
            return [f.permute(0, 3, 1, 2) for f in features]
        return list(features)

    def _check_contract(self, in_channels: int, tile_hw: tuple[int, int]) -> frozenset[str]:
        """Run the model on the meta device (shapes, no numbers) and return the names of the parameters in use."""
        height, width = tile_hw
        parameters = {n: torch.empty_like(p, device="meta").requires_grad_() for n, p in self.net.named_parameters()}
        buffers = {n: b.to("meta") for n, b in self.net.named_buffers()}
        image = torch.empty(1, in_channels, height, width, device="meta")
        self.net.eval()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                maps = self._maps(functional_call(self.net, {**parameters, **buffers}, (image,)))
        except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            size = f"{in_channels} x {height} x {width} pixels"
            raise UserError(
                f"model.backbone {self.name!r} cannot take {size}: {first_line(error)}",
                fix="choose a convolutional backbone, or name the size in model.backbone_options, "
                f"for example img_size: [{height}, {width}]",
            ) from error
        self.net.train()
        found = [tuple(m.shape[1:]) for m in maps]
        promised = [(d, height // s, width // s) for d, s in zip(self.channels, self.strides, strict=True)]
        if found != promised:
            raise UserError(
                f"model.backbone {self.name!r} returns maps {found} where its strides promise {promised}",
                fix="choose another backbone, or an image size that is a multiple of the strides",
            )
        used = _reached(maps)
        return frozenset(name for name, parameter in parameters.items() if id(parameter) in used)


class HasBackbone(Protocol):
    """A model with a `backbone`."""

    backbone: Backbone


def build_backbone(
    name: str,
    *,
    scales: Sequence[int] | None,
    in_channels: int,
    tile_hw: tuple[int, int],
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    options: dict[str, Any] | None = None,
) -> Backbone:
    """The timm model `name` with a map for each of `scales` up to its coarsest stride.

    Beside timm's names, `mammoclip_b2` and `mammoclip_b5` are the published encoders (see msmil.models.mammoclip).

    Args:
        scales: wanted strides, ascending; those beyond the backbone's coarsest are left to the pyramid. None: the
            coarsest map alone, for pooling, where a tile need not be a multiple of its stride.
        in_channels: channels of the input.
        tile_hw: height and width in pixels of what it will be called on.
        pretrained: load timm's weights.
        drop_path_rate: largest rate of stochastic depth.
        options: further arguments of `timm.create_model`.

    Raises:
        UserError: unknown name, option, stride or image size; weights that cannot be loaded.
    """
    published = ENCODERS.get(name)
    timm_name = name if published is None else published.timm_name
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *ENCODERS], n=5, cutoff=0.5)
        raise UserError(
            f"model.backbone is {name!r}, which timm {timm.__version__} does not know",
            fix=f"did you mean one of {near}?" if near else "choose one of timm.list_models()",
        )
    if published is not None and pretrained:
        fix = "set model.pretrained: false, convert the released file (msmil convert) and name it as model.weights"
        raise UserError(f"timm's hub holds no weights of {name!r}, which is Mammo-CLIP's encoder", fix=fix)
    own = {} if published is None else published.options
    arguments = {"features_only": True, "in_chans": in_channels, **own, **(options or {})}
    with torch.device("meta"):
        probe, arguments = with_drop_path(timm_name, arguments, drop_path_rate)
    info: Any = probe.feature_info
    if scales is None:
        scales = (last := max(info.reduction()),)
        tile_hw = (-(-tile_hw[0] // last) * last, -(-tile_hw[1] // last) * last)
    indices = level_indices(name, info, scales)
    net = create(timm_name, {**arguments, "out_indices": indices}, pretrained=pretrained)
    if published is not None:
        published.apply_padding(net)
    drop_unused_stages(net)
    architecture = repr((name, sorted(arguments.items()), indices, in_channels, tile_hw))
    return Backbone(net, name=name, in_channels=in_channels, tile_hw=tile_hw, architecture=architecture)


def ordered_blocks(backbone: Backbone) -> list[nn.Module]:
    """The backbone's blocks in forward order, stages flattened and the stem left out (EfficientNet-B2: 23)."""
    used = {id(p) for _, p in backbone.used_parameters()}
    return [b for b in _walk(backbone.net) if any(id(p) in used for p in b.parameters())]


def set_trainable(model: HasBackbone, blocks: Literal["all"] | int) -> None:
    """Let the last `blocks` blocks of the backbone train, all of it, or (0) nothing of it.

    What lies between and behind these blocks (downsampling, norms) trains with them; what lies before is frozen
    and runs in eval mode. With 8 blocks EfficientNet-B2 is finetuned as published (method: blocks 15..22 of 23).

    Raises:
        UserError: more blocks than the backbone has.
    """
    set_trainable_parameters(model.backbone, blocks)


def set_trainable_parameters(backbone: Backbone, blocks: Literal["all"] | int) -> None:
    """`set_trainable` of the backbone itself."""
    parameters = [p for _, p in backbone.used_parameters()]
    if blocks == "all":
        first = 0
    elif blocks == 0:
        first = len(parameters)
    else:
        found = ordered_blocks(backbone)
        if blocks > len(found):
            raise UserError(
                f"train.trainable_blocks is {blocks}, but backbone {backbone.name!r} has {len(found)} blocks",
                fix=f"give at most {len(found)}, or all (which trains the stem too)",
            )
        start = {id(p) for p in found[-blocks].parameters()}
        first = next(i for i, p in enumerate(parameters) if id(p) in start)
    backbone.net.requires_grad_(False)
    for parameter in parameters[first:]:
        parameter.requires_grad_(True)
    backbone.train(backbone.training)


def freeze_statistics(model: HasBackbone) -> None:
    """Keep the backbone's batch-norm statistics as they are, now and after every `model.train()`."""
    model.backbone.frozen_statistics = True
    model.backbone.train(model.backbone.training)


def set_gradient_checkpointing(model: HasBackbone, enable: bool = True) -> None:
    """Recompute the backbone's activations in the backward pass instead of keeping them.

    Raises:
        UserError: timm does not offer it for this backbone.
    """
    net: Any = model.backbone.net
    owner: Any = net if hasattr(net, "set_grad_checkpointing") else getattr(net, "model", None)
    try:
        owner.set_grad_checkpointing(enable)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"train.gradient_checkpointing is on, but timm does not offer it for {model.backbone.name!r}",
            fix="set train.gradient_checkpointing: false, or choose another model.backbone",
        ) from error


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name.startswith(_NOT_BLOCKS):
            continue
        if isinstance(child, _CONTAINERS) or isinstance(getattr(child, "blocks", None), _CONTAINERS):
            yield from _walk(child)
        elif any(True for grandchild in child.children() for _ in grandchild.parameters()):
            yield child


def _reached(maps: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that these depend on, found by walking their graph (a backward pass costs more)."""
    found: set[int] = set()
    nodes: list[Any] = [feature.grad_fn for feature in maps]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        further = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= further
        nodes += further
    return found
