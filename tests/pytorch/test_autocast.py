"""Autocast on the CPU: the output keeps the dtype of x, gradients those of what they are of."""

import pytest
import torch
from torch import nn

from metapool_kernels import MetaPool2d, fused_meta_pool
from tests.cases import Case

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dtypes_of_outputs_and_gradients(backend: str, compiled: bool, half: torch.dtype) -> None:
    torch._dynamo.reset()
    function = fused_meta_pool
    if compiled:
        function = torch.compile(fused_meta_pool, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, half):
        x, _, grad_out = Case(dtype=dtype).tensors()
        alpha = torch.zeros(7, requires_grad=True)
        wanted = (x.requires_grad_(), alpha)
        outside = fused_meta_pool(x, alpha, backend=backend)
        with torch.autocast("cpu", dtype=half):
            out = function(x, alpha, backend=backend)
            with torch.autocast("cpu", enabled=False):
                inner = function(x, alpha, backend=backend)
        for result in (out, inner):
            assert result.dtype is dtype
            torch.testing.assert_close(result, outside)
            grads = torch.autograd.grad(result, wanted, grad_out)
            assert [grad.dtype for grad in grads] == [dtype, torch.float32]
        expected = torch.autograd.grad(outside, wanted, grad_out)
        for got, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, right)


def test_a_compiled_network_under_autocast(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 1), MetaPool2d(backend=backend), nn.Conv2d(6, 2, 1))
    x = torch.randn(2, 3, 9, 8)

    def step(call: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(x)
        assert out.dtype is torch.bfloat16
        return [out, *torch.autograd.grad(out.float().square().sum(), list(network.parameters()))]

    got = step(torch.compile(network, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, step(network), strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b)
