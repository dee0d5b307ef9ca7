"""bf16 on a CPU without instructions for it: the numbers of torch's own kernels, not their time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from msmil.engine.bf16 import compute_bf16

ULP = 2.0**-8  # relative, of bf16's eight bits


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    compute_bf16(natively=True)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(q: Tensor, k: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, k)


OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "convolution": (lambda x, w: functional.conv2d(x, w, padding=1, stride=2), [(2, 8, 17, 13), (16, 8, 3, 3)]),
    "convolution, padding by name": (
        lambda x, w: functional.conv2d(x, w, padding="same"),
        [(2, 8, 9, 9), (4, 8, 3, 3)],
    ),
    "depthwise": (lambda x, w: functional.conv2d(x, w, groups=8), [(2, 8, 9, 9), (8, 1, 3, 3)]),
    "convolution with bias": (functional.conv2d, [(2, 3, 9, 9), (4, 3, 3, 3), (4,)]),
    "linear": (functional.linear, [(5, 40), (7, 40), (7,)]),
    "matrix product": (torch.matmul, [(3, 5, 40), (40, 6)]),
    "batched product": (torch.bmm, [(3, 5, 40), (3, 40, 6)]),
    "sum and product": (torch.addmm, [(5, 6), (5, 40), (40, 6)]),
    "sum and batched product": (torch.baddbmm, [(3, 5, 6), (3, 5, 40), (3, 40, 6)]),
    "einsum": (lambda a, b: torch.einsum("bks,bsd->bkd", a, b), [(2, 3, 40), (2, 40, 5)]),
    "attention": (attention, [(2, 2, 7, 16), (2, 2, 9, 16)]),
}


def result_and_gradients(call: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*inputs)
    result.float().square().mean().backward()
    gradients = [value.grad for value in inputs if value.grad is not None]
    assert len(gradients) == len(inputs)
    return [result.detach(), *gradients]


@pytest.mark.parametrize("name", OPERATORS)
def test_numbers_are_those_of_torchs_own_kernels(name: str) -> None:
    """Both round to bf16; sums in another order may move a number to its neighbour."""
    compute_bf16(natively=True)
    expected = result_and_gradients(*OPERATORS[name])
    compute_bf16(natively=False)
    found = result_and_gradients(*OPERATORS[name])
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).abs().max() <= 2 * ULP * other.float().abs().max()


def test_factors_and_results_are_rounded() -> None:
    compute_bf16(natively=False)
    one = torch.tensor([[1 + 2**-10, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ one.T).item() == 2, "1 + 2^-10 is 1 in bf16"
        assert (torch.full((1, 257), 1.0) @ torch.full((257, 1), 1.0)).item() == 256, "257 is no bf16 number"
    assert (one @ one.T).item() > 2, "outside of autocast nothing is rounded"


def test_sums_are_those_of_fp32() -> None:
    """256 + 1 + 1 + ... would stay 256 if every sum were rounded."""
    compute_bf16(natively=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.cat([torch.tensor([256.0]), torch.ones(256)])[None] @ torch.ones(257, 1)).item() == 512


def test_a_network_with_recomputed_blocks_learns_the_same() -> None:
    """Recomputing in the backward pass enters autocast by itself, and has to find the same kernels."""
    compute_bf16(natively=False)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 25, 1))
    gradients = []
    for recompute in (False, True):
        twin = copy.deepcopy(network)
        with torch.autocast("cpu", torch.bfloat16):
            x = draw(2, 1, 9, 9)
            result = checkpoint(twin, x, use_reentrant=False) if recompute else twin(x)
        result.float().sum().backward()
        gradients.append([value.grad for value in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_network_computes_them_too() -> None:
    compute_bf16(natively=False)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 49, 1))
    x = draw(2, 1, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = network(x), torch.compile(network, backend="aot_eager")(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).abs().max() <= 4 * ULP * expected.float().abs().max()


def test_what_autocast_leaves_alone_is_left_alone() -> None:
    compute_bf16(natively=False)
    x = draw(3, 4).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(x @ x.T, x.matmul(x.T))
        assert (x @ x.T).dtype == torch.float64
