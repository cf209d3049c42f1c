"""Every configuration that the Triton kernels can be tuned to gives the right results."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metapool_kernels import fused_multi_pool, pool_candidates
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.layout import is_channels_last
from metapool_kernels.spec import PoolSpec
from tests import judge
from tests.backends import BACKENDS, DEVICE
from tests.cases import Case

if "triton" not in BACKENDS:
    pytest.skip("Triton runs on a GPU or in its interpreter", allow_module_level=True)

from metapool_kernels._triton import launch, plan

pytestmark = pytest.mark.every

AVG = pool_candidates(kinds=("avg",), skip=False)
MAPS = {
    "low, vectors of 4": Case((1, 3, 6, 8)),
    "low, vectors of 2": Case((1, 3, 6, 6)),
    "low, odd": Case((2, 3, 7, 7)),
    "low, channels_last": Case((2, 3, 7, 7), layout="channels_last"),
    "low, averages, vectors of 4": Case((1, 3, 6, 8), candidates=AVG),
    "low, averages, vectors of 2": Case((1, 3, 6, 6), candidates=AVG),
    "low, averages, channels_last": Case((2, 3, 7, 7), candidates=AVG, layout="channels_last"),
    "high, vectors of 4": Case((1, 2, 17, 8)),
    "high, vectors of 2": Case((1, 2, 17, 6)),
    "high, odd": Case((1, 2, 17, 5)),
    "high, odd, strips": Case((1, 2, 17, 5), candidates=("max_pool_7x1", "avg_pool_1x7", "none")),
    "high, channels_last": Case((1, 2, 17, 6), layout="channels_last"),
    "high, averages, vectors of 4": Case((1, 2, 17, 8), candidates=AVG),
    "high, averages, vectors of 2": Case((1, 2, 17, 6), candidates=AVG),
    "high, averages, odd": Case((1, 2, 17, 5), candidates=AVG),
    "heavy": Case((1, 2, 16, 9), candidates=("max_pool_9x9", "avg_pool_9x9")),
    "strips": Case((1, 1, 61, 5)),
    "tiles": Case((1, 2, 5, 71)),
}


def _regime(case: Case, backward: bool, form: str = "mix") -> plan.Regime:
    x, _, grad_out = case.tensors()
    maps = (plan.layout_of(x), plan.layout_of(grad_out))
    return plan.regime_of(maps, _spec(case, x), backward=backward, has_values=False, form=form)


def _spec(case: Case, x: Tensor) -> PoolSpec:
    codes = tuple(candidate.code for candidate in parse_candidates(case.candidates))
    return PoolSpec(codes, (1, 1), True, is_channels_last(x), "triton")


CONFIGS = [
    pytest.param(case, backward, config, id=f"triton-{name}-{'bwd' if backward else 'fwd'}-{i}")
    for name, case in MAPS.items()
    for backward in (False, True)
    for i, config in enumerate(plan.configs(_regime(case, backward)))
]


@pytest.mark.parametrize("case, backward, config", CONFIGS)
def test_configuration(case: Case, backward: bool, config: plan.Config) -> None:
    x, weights, grad_out = (t.to(DEVICE) for t in replace(case, normalize=None).tensors())
    spec = _spec(case, x)
    if backward:
        grads = launch.meta_pool_bwd(grad_out, x, weights, None, spec, (True, True), config)
        got = {"grad_x": grads[0].cpu(), "grad_alpha": grads[1].cpu()}
    else:
        got = {"out": launch.meta_pool_fwd(x, weights, None, spec, config).cpu()}
    case = replace(case, normalize=None)
    judge.verdict(got, case, x.cpu(), weights.cpu(), grad_out.cpu())


TERMS = [
    pytest.param(case, config, id=f"triton-{name}-{i}")
    for name, case in MAPS.items()
    for i, config in enumerate(plan.configs(_regime(case, False, "moments")))
]


@pytest.mark.parametrize("case, config", TERMS)
def test_configuration_of_sums(case: Case, config: plan.Config) -> None:
    """Moments, and products with another map; the same sums of poolings in float64."""
    x, _, grad_out = (t.to(DEVICE) for t in case.tensors())
    spec, count = _spec(case, x), len(case.candidates)
    pooled = fused_multi_pool(x.double(), case.candidates, backend="reference")
    pooled = pooled.unflatten(1, (count, -1)).transpose(1, 2)
    variance, mean = torch.var_mean(pooled, (3, 4), correction=0)
    right = torch.stack((mean, variance * x[0, 0].numel()), -1)
    torch.testing.assert_close(launch.pool_moments(x, spec, config), right, rtol=1e-5, atol=1e-5)
    shifts = mean[0].float()
    grads = grad_out.double()[:, :, None]
    products = (grads * (pooled - shifts.double()[..., None, None])).sum((3, 4))
    right = torch.stack((grads.sum((3, 4)).expand_as(products), products), -1)
    torch.testing.assert_close(
        launch.pool_products(grad_out, x, shifts, spec, config), right, rtol=1e-5, atol=1e-4
    )


SENT = [
    pytest.param(case, form, config, id=f"triton-{name}-{form}-{i}")
    for name, case in MAPS.items()
    for form in ("stack", "fields")
    for i, config in enumerate(plan.configs(_regime(case, True, form)))
]


@pytest.mark.parametrize("case, form, config", SENT)
def test_configuration_of_what_is_sent(case: Case, form: str, config: plan.Config) -> None:
    """Each pooling sends something of its own; the same in float64."""
    x, _, grad_out = (t.to(DEVICE) for t in case.tensors())
    spec, count = _spec(case, x), len(case.candidates)
    wide = x.double().requires_grad_()
    pooled = fused_multi_pool(wide, case.candidates, backend="reference")
    of_each = pooled.detach().unflatten(1, (count, -1))
    if form == "stack":
        sent = torch.randn(pooled.shape, device=DEVICE)
        got, _ = launch.meta_pool_bwd(sent, x, None, None, spec, (True, False), config)
    else:
        terms = tuple(torch.randn(x.shape[1], count, device=DEVICE) for _ in range(4))
        got = launch.affine_bwd(grad_out, x, *terms, spec, config)
        weight, offset, slope, shift = (term.double().t()[..., None, None] for term in terms)
        sent = weight * grad_out.double()[:, None] + offset + slope * (of_each - shift)
    (right,) = torch.autograd.grad(pooled, wide, sent.double().reshape(pooled.shape))
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=2e-5)


def test_every_configuration_of_triton_is_tried() -> None:
    forward = (plan._LOW_FORWARD, plan._FORWARD)
    backward = (plan._LOW_BACKWARD, plan._BACKWARD, plan._LOW_BACKWARD_AVG, plan._BACKWARD_AVG)
    known = {(False, plan._HEAVY), (True, plan._HEAVY), (True, plan._WIDE_BACKWARD)}
    known |= {(False, configs) for table in forward for configs in table.values()}
    known |= {(True, configs) for table in backward for configs in table.values()}
    tried = {(b, plan.configs(_regime(case, b))) for case in MAPS.values() for b in (False, True)}
    assert tried == known
    tried = {plan.configs(_regime(case, False, "moments")) for case in MAPS.values()}
    assert tried == {plan._LOW_TERMS, plan._TERMS, plan._HEAVY_EACH}
    forms = ("stack", "fields")
    tried = {plan.configs(_regime(case, True, form)) for case in MAPS.values() for form in forms}
    each = {plan._LOW_BACKWARD_EACH, plan._BACKWARD_STACK, plan._BACKWARD_EACH}
    of_averages = {plan._LOW_BACKWARD_FIELDS_AVG, plan._BACKWARD_FIELDS_AVG, plan._HEAVY_EACH}
    assert each | of_averages <= tried


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_strips_and_tiles_are_cut_in_triton(columns: int) -> None:
    x = torch.empty(1, 1, 61, 71)
    maps = (plan.layout_of(x), plan.layout_of(x))
    spec = _spec(Case(), x)
    config = plan.Config(columns, 4, 4)
    forward = plan.forward_tile(maps, spec, config)
    backward, segments = plan.backward_tile(maps, spec, config)
    assert forward.strips.number > 1
    assert backward.strips.number > 1
    assert segments.tiles > 1 or backward.groups <= plan.SEGMENT
