"""Maps of more than 2**31 elements and of more than 2**32 bytes; `make test-large` runs them.

A map repeats a block of noise along its rows or its images, so that all of its results are known
from those of a few blocks: the first and the last rows are compared with the truth on a cut-out,
the second block as well, and all others with that, bit for bit. The gradient of the weights is
linear in the number of blocks. Three maps are there at a time: 14 GiB.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metapool_kernels import numpy_api
from tests import judge
from tests.backends import BACKENDS, require, skip_or_fail
from tests.cases import Case, Size

HALO = 6
"""Rows from which the gradient of a row comes: those of two windows of 7, one upon the other."""

pytestmark = [
    pytest.mark.large,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("reference" not in BACKENDS, reason="tests/cuda/test_on_gpu.py has its own"),
]


@dataclass(frozen=True)
class Large:
    """A map that repeats its first ``period`` rows (axis 2) or images (axis 0)."""

    size: Size
    dtype: torch.dtype
    axis: int
    period: int
    layout: str = "contiguous"

    @property
    def case(self) -> Case:
        """What is asked of it: the default candidates, whose weights are given as they are."""
        return Case(self.size, self.dtype, self.layout, normalize=None, alpha_dtype=torch.float32)

    def empty(self) -> Tensor:
        """Memory for such a map."""
        last = self.layout == "channels_last"
        form = torch.channels_last if last else torch.contiguous_format
        return torch.empty(self.size, dtype=self.dtype, memory_format=form)

    def block(self, seed: int) -> Tensor:
        """What is repeated; its mean is not zero, so that sums over all of it say something."""
        size = [*self.size]
        size[self.axis] = self.period
        rng = torch.Generator().manual_seed(seed)
        return (torch.randn(size, generator=rng) + 0.5).to(self.dtype)

    def repeat(self, block: Tensor, to: Tensor) -> Tensor:
        """Fill a map, large or small, with a block."""
        for part in to.split(self.period, self.axis):
            part.copy_(block.narrow(self.axis, 0, part.shape[self.axis]))
        return to


ROWS, WIDTH = 50_006, 46_349  # 2**31 elements end in row 46333
LARGE = {
    "one plane": Large((1, 1, ROWS, WIDTH), torch.bfloat16, 2, 12),
    "planes": Large((523, 257, 128, 127), torch.bfloat16, 0, 1),
    "planes, channels last": Large((523, 257, 128, 127), torch.bfloat16, 0, 1, "channels_last"),
    "wide, channels last": Large((1, 17, 11_703, 11_001), torch.bfloat16, 2, 12, "channels_last"),
    "bytes, one plane": Large((1, 1, 25_003, WIDTH), torch.float32, 2, 12),
    "bytes, planes": Large((263, 257, 128, 127), torch.float32, 0, 1),
}


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """All of the machine's cores, and enough memory for a map, its result and a gradient."""
    told = Path("/proc/meminfo")
    if not told.exists():
        skip_or_fail(f"15 GiB of memory are needed, and no {told} says what is available")
    facts = dict(line.split(":") for line in told.read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) >> 20
    if free < 15:
        skip_or_fail(f"15 GiB of memory are needed and {free} are available")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def _assert_right(
    name: str, got: Tensor, large: Large, x: Tensor, alpha: Tensor, grad_out: Tensor
) -> None:
    """Compare all of a result: with the truth at both ends and in the middle, then with itself."""
    count, period, axis = large.size[large.axis], large.period, large.axis
    beyond = 2**32 // large.dtype.itemsize * count // math.prod(large.size)
    for start in {0, period, min(beyond, count - 2 * period), count // 2, count - period}:
        _compare(name, got, large, x, alpha, grad_out, start)
    second = got.narrow(axis, period, period).clone()
    inner = count if axis == 0 else count - HALO
    for start in range(2 * period, inner, period):
        part = got.narrow(axis, start, min(period, inner - start))
        expected = second.narrow(axis, 0, part.shape[axis])
        assert torch.equal(part, expected), f"{name} differs from {start} on"


def _compare(
    name: str, got: Tensor, large: Large, x: Tensor, alpha: Tensor, grad_out: Tensor, start: int
) -> None:
    """One block of a result against the truth on a cut-out, with a halo around it."""
    axis, count = large.axis, large.size[large.axis]
    halo = HALO if axis == 2 else 0
    first, last = max(0, start - halo), min(count, start + large.period + halo)
    maps = [tensor.narrow(axis, first, last - first) for tensor in (x, grad_out)]
    small = maps[0], alpha, maps[1]
    case = replace(large.case, size=tuple(maps[0].shape))
    wants = ("out", name) if name != "out" else ("out",)
    inside = (axis, start - first, min(large.period, count - start))
    right, plain = (
        judge.run(function, case, *small, wants)[name].narrow(*inside)
        for function in (judge.truth, judge.eager)
    )
    size = judge.magnitudes(case, *small, wants)[name]
    part = got.narrow(axis, start, inside[2])
    judge.compare(name, part, right, plain, size, judge.terms(case, name), torch.float32)


def _assert_sums_are_right(got: Tensor, large: Large, blocks: list[Tensor], alpha: Tensor) -> None:
    """The gradient of the weights, whose truth is linear in the number of blocks.

    The kernels add up 64 products at most in float32, and those sums in float64: what they lose is
    random and hardly a rounding unit of the sum of magnitudes. Eager PyTorch loses more.
    """
    count, rest = divmod(large.size[large.axis], large.period)
    sums = []
    for repeats in (2, 3):
        size = [*large.size]
        size[large.axis] = repeats * large.period + rest
        maps = [large.repeat(block, torch.empty(size, dtype=large.dtype)) for block in blocks]
        case = replace(large.case, size=tuple(size))
        small = maps[0], alpha, maps[1]
        right = judge.run(judge.truth, case, *small, ("grad_alpha",))["grad_alpha"]
        magnitude = judge.magnitudes(case, *small, ("grad_alpha",))["grad_alpha"]
        sums.append((right.double(), magnitude))
    (two, least), (three, more) = sums
    right = two + (count - 2) * (three - two)
    unit = torch.finfo(torch.float32).eps * (least + (count - 2) * (more - least))
    assert (right.abs() > 1000 * unit).all(), "a sum that says nothing"
    worst = (got.double() - right).abs().max().item()
    assert worst <= unit, f"error {worst:.3g} is above {unit:.3g}; truth {right.tolist()}"


@pytest.mark.parametrize("name", LARGE)
def test_forward_and_backward(native: str, name: str) -> None:
    large = LARGE[name]
    elements = math.prod(large.size)
    assert elements > 2**31 or elements * large.dtype.itemsize > 2**32
    blocks = [large.block(seed) for seed in (0, 1)]
    x = large.repeat(blocks[0], large.empty()).requires_grad_()
    alpha = torch.linspace(-0.5, 1, 7, requires_grad=True)
    out = judge.fused(native)(x, alpha, large.case)
    assert out.stride() == x.stride()
    cut = x.detach(), alpha.detach()
    _assert_right("out", out.detach(), large, *cut, cut[0])
    grad_out = large.repeat(blocks[1], out.detach())  # backward does not read out
    grad_x, grad_alpha = torch.autograd.grad(out, (x, alpha), grad_out)
    _assert_right("grad_x", grad_x, large, *cut, grad_out)
    _assert_sums_are_right(grad_alpha, large, blocks, cut[1])


def test_arrays() -> None:
    """The NumPy functions, with more than 2**31 elements of float16."""
    try:
        numpy_api.isa_names()
    except RuntimeError as error:
        skip_or_fail(str(error))
    large = replace(LARGE["one plane"], dtype=torch.float16)
    blocks = [large.block(seed) for seed in (0, 1)]
    x = large.repeat(blocks[0], large.empty())
    alpha = torch.linspace(-0.5, 1, 7)
    arrays = x.numpy(), alpha.numpy()
    out = torch.from_numpy(numpy_api.meta_pool(*arrays))
    _assert_right("out", out, large, x, alpha, x)
    grad_out = large.repeat(blocks[1], out)
    grads = numpy_api.meta_pool_grad(grad_out.numpy(), *arrays)
    _assert_right("grad_x", torch.from_numpy(grads[0]), large, x, alpha, grad_out)
    _assert_sums_are_right(torch.from_numpy(grads[1]), large, blocks, alpha)


def test_the_reference() -> None:
    """More than 2**32 bytes; its maps of each pooling leave memory for one average alone."""
    backend = require("reference")
    large = LARGE["bytes, one plane"]
    x = large.repeat(large.block(0), large.empty()).requires_grad_()
    case = replace(large.case, candidates=("avg_pool_3x3",))
    alpha = torch.tensor([0.75])
    out = judge.fused(backend)(x, alpha, case)
    band = slice(-9, None)
    small = judge.run(judge.fused(backend), case, x.detach()[:, :, band], alpha, x[:, :, band])
    assert torch.equal(out[:, :, -8:], small["out"][:, :, 1:])
    (grad_x,) = torch.autograd.grad(out, x, x.detach())
    assert torch.equal(grad_x[:, :, -7:], small["grad_x"][:, :, 2:])
