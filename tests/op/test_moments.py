"""What normalising takes beside the two ops, each by itself: moments, products, constants."""

import pytest
import torch
from torch import Tensor

from metapool_kernels import fused_meta_pool, fused_multi_pool
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.layout import is_channels_last
from metapool_kernels.moments import affine_bwd, affine_fwd, pool_moments, pool_products
from metapool_kernels.ops import meta_pool_bwd
from metapool_kernels.spec import PoolSpec
from tests import cases, judge
from tests.backends import COMPILED, DEVICE, require

SIZES = {name: size for name, (size, _) in cases.SHAPES.items()}
SIZES["parts"] = (1, 2, 60, 40)
"""A plane that several blocks of a GPU share."""

POOLED = {
    "squares": ("max_pool_3x3", "avg_pool_5x5", "skip_connect", "max_pool_7x7", "avg_pool_7x7"),
    "maxima": ("max_pool_5x5", "max_pool_3x3"),
    "averages": ("avg_pool_3x3", "avg_pool_7x7"),
    "any": ("max_pool_3x3", "avg_pool_5x5", "max_pool_1x9", "max_pool_3x3"),
}
"""Sets of poolings that go different ways."""


def _poolings(
    name: str, x: Tensor, names: tuple[str, ...], stride: int = 1
) -> tuple[Tensor, PoolSpec]:
    """In float64, (N, C, K, H_out, W_out), and what a backend is asked for them by."""
    wide, one = x.double(), torch.ones(1).double()
    pooled = [
        fused_meta_pool(wide, one, (each,), normalize=None, stride=stride, backend="reference")
        for each in names
    ]
    codes = tuple(candidate.code for candidate in parse_candidates(names))
    spec = PoolSpec(codes, (stride, stride), True, is_channels_last(x), require(name))
    return torch.stack(pooled, 2), spec


@pytest.mark.parametrize("names", POOLED)
@pytest.mark.parametrize("layout", [*cases.NATIVE_LAYOUTS, "sliced", "permuted"])
@pytest.mark.parametrize(
    "size", ["primes", "map14", "wide", "tall", "c17", "w16", "no_batch", "parts"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_moments(name: str, dtype: torch.dtype, size: str, layout: str, names: str) -> None:
    """Of each plane what float64 has of the pooled maps, also around a large mean."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(SIZES[size], generator=rng) + 50
    x = cases.LAYOUTS[layout](base.to(dtype))
    stride = 1 if "skip_connect" in POOLED[names] else 1 + (size == "c17")
    pooled, spec = _poolings(name, x, POOLED[names], stride)
    grad_out = torch.randn(pooled[:, :, 0].shape, generator=rng).to(dtype)
    shifts = 50 + torch.randn(base.shape[1], len(POOLED[names]), generator=rng)
    shifts = shifts.to(judge.accumulation(dtype))
    there, grads = x.to(DEVICE), cases.LAYOUTS[layout](grad_out).to(DEVICE)

    got = pool_moments(there, spec).cpu()
    assert got.dtype is torch.float64 and got.shape == (*pooled.shape[:3], 2)
    mean = pooled.mean((3, 4))
    torch.testing.assert_close(got[..., 0], mean, rtol=3e-7, atol=0)
    deviations = (pooled - mean[..., None, None]).square().sum((3, 4))
    torch.testing.assert_close(got[..., 1], deviations, rtol=2e-5, atol=2e-5)

    got = pool_products(grads, there, shifts.to(DEVICE), spec).cpu()
    wide = cases.LAYOUTS[layout](grad_out).double()[:, :, None]
    apart = pooled - shifts.double()[..., None, None]
    largest = max((wide * apart).abs().sum((3, 4)).flatten().tolist(), default=0.0)
    totals = wide.sum((3, 4)).expand(got.shape[:3])
    torch.testing.assert_close(got[..., 0], totals, rtol=1e-5, atol=1e-5)
    products = (wide * apart).sum((3, 4))
    torch.testing.assert_close(got[..., 1], products, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("name", COMPILED)
def test_a_first_value_far_away(name: str) -> None:
    """What all others are far from says nothing of how they vary, nor does what is no number."""
    for first in (-1e6, -torch.inf):
        x = torch.randn(1, 2, 40, 24)
        x[0, :, 0, 0] = first
        pooled, spec = _poolings(name, x, POOLED["maxima"])
        got = pool_moments(x.to(DEVICE), spec).cpu()[..., 1]
        right = pooled.var((3, 4), correction=0) * 960
        torch.testing.assert_close(got, right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_first_value_in_a_corner(stride: int) -> None:
    """Far from others, as averages in corners are, it costs the CPU kernels no digits."""
    x = 0.1 * torch.randn(1, 64, 12 * stride, 19 * stride)
    x[0, :, 0, 0] = 5
    pooled, spec = _poolings("cpu", x, POOLED["averages"], stride)
    right = pooled.var((3, 4), correction=0) * 12 * 19
    torch.testing.assert_close(pool_moments(x, spec)[..., 1], right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["channels", "images"])
@pytest.mark.parametrize("name", COMPILED)
def test_constants_of_planes(name: str, shape: tuple[int, ...], layout: str) -> None:
    """They are added before anything is rounded."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(SIZES["primes"], generator=rng) + 50
    x = cases.LAYOUTS[layout](x.to(torch.bfloat16))
    pooled, spec = _poolings(name, x, POOLED["any"])
    weights = torch.randn(*shape, len(POOLED["any"]), generator=rng)
    constants = -50 * weights.sum(-1, keepdim=True)
    got = affine_fwd(x.to(DEVICE), weights.to(DEVICE), constants.to(DEVICE), spec).cpu()
    right = (weights.double()[..., None, None] * pooled).sum(2) + constants.double()[..., None]
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), right, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("names", ["averages", "maxima", "any"])
@pytest.mark.parametrize("name", COMPILED)
def test_poolings_do_not_matter_without_a_slope(name: str, names: str, stride: int) -> None:
    """Nor where they are no numbers: each is sent the same as side by side."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(SIZES["primes"], generator=rng)
    x[:, :, 3, 4] = torch.nan
    x[:, :, -1, 0] = torch.inf
    pooled, spec = _poolings(name, x, POOLED[names], stride)
    n, c, count, *size = pooled.shape
    grad_out = torch.randn((n, c, *size), generator=rng)
    weights, offsets, shifts = torch.randn((3, c, count), generator=rng)
    fields = (weights[..., None, None] * grad_out[:, :, None] + offsets[..., None, None]).float()
    fields = fields.transpose(1, 2).flatten(1, 2)
    there = [tensor.to(DEVICE) for tensor in (x, grad_out, fields, weights, offsets, shifts)]
    x, grad_out, fields, weights, offsets, shifts = there
    slopes = torch.zeros_like(shifts)
    got = affine_bwd(grad_out, x, weights, offsets, slopes, shifts, spec)
    right, _ = meta_pool_bwd(fields, x, None, None, spec, (True, False))
    assert right.isfinite().all()
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("names", POOLED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("counts", [True, False], ids=["padding counts", "it does not"])
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["channels", "images"])
@pytest.mark.parametrize("size", ["primes", "c17", "w16"])
@pytest.mark.parametrize("name", COMPILED)
def test_fields(
    name: str, size: str, shape: tuple[int, ...], counts: bool, layout: str, names: str
) -> None:
    """What candidates send depends on their own values; there is no more of it than on the map."""
    rng = torch.Generator().manual_seed(2)
    x = cases.LAYOUTS[layout](torch.randn(2, 5, *SIZES[size][2:], generator=rng))
    stride = 1 if "skip_connect" in POOLED[names] else 1 + (size == "c17")
    spec = _poolings(name, x, POOLED[names], stride)[1]._replace(count_include_pad=counts)
    terms = [torch.randn(*shape, len(POOLED[names]), generator=rng) for _ in range(4)]
    terms[2][..., 0] = 0
    wide = x.double().requires_grad_()
    pooled = fused_multi_pool(
        wide, POOLED[names], stride=stride, count_include_pad=counts, backend="reference"
    )
    of_each = pooled.unflatten(1, (-1, 5)).transpose(1, 2)
    grad_out = cases.LAYOUTS[layout](torch.randn(of_each[:, :, 0].shape, generator=rng))
    weights, offsets, slopes, shifts = (term.double()[..., None, None] for term in terms)
    sent = weights * grad_out.double()[:, :, None] + offsets + slopes * (of_each - shifts)
    (right,) = torch.autograd.grad(of_each, wide, sent.detach())
    w, o, s, shift = (term.to(DEVICE) for term in terms)
    got = affine_bwd(grad_out.to(DEVICE), x.to(DEVICE), w, o, s, shift, spec).cpu()
    assert is_channels_last(got) == (layout == "channels_last")
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=2e-5)
