"""What only a GPU can show: graphs, streams, devices and maps beyond 32 bits.

The correctness suite itself runs there under METAPOOL_TEST_DEVICE=cuda.
"""

import pytest
import torch
from torch import Tensor

from metapool_kernels import DEFAULT_CANDIDATES, fused_meta_pool
from tests.backends import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or INTERPRETED, reason="METAPOOL_TEST_DEVICE is not cuda"
)


def _tensors(size: tuple[int, ...] = (2, 16, 14, 14)) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, device="cuda", requires_grad=True)
    return x, torch.randn(len(DEFAULT_CANDIDATES), device="cuda", requires_grad=True)


def _results(x: Tensor, alpha: Tensor, backend: str) -> tuple[Tensor, ...]:
    out = fused_meta_pool(x, alpha, backend=backend)
    return (out, *torch.autograd.grad(out, (x, alpha), torch.ones_like(out)))


def _assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_run_to_run(backend: str) -> None:
    x, alpha = _tensors((8, 32, 56, 56))
    expected = _results(x, alpha, backend)
    for _ in range(20):
        _assert_same(_results(x, alpha, backend), expected)


def test_cuda_graph(backend: str) -> None:
    x, alpha = _tensors()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _results(x, alpha, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(x, alpha, backend)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    _assert_same(captured, _results(x, alpha, backend))


def test_second_stream(backend: str) -> None:
    x, alpha = _tensors((8, 32, 56, 56))
    expected = _results(x, alpha, backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        later = x.detach().clone().requires_grad_()
        got = _results(later, alpha, backend)
    stream.synchronize()
    _assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_current(backend: str) -> None:
    x, alpha = _tensors()
    expected = _results(x, alpha, backend)
    there = [tensor.detach().to("cuda:1").requires_grad_() for tensor in (x, alpha)]
    _assert_same(tuple(t.to("cuda:0") for t in _results(*there, backend)), expected)


def test_no_synchronisation(backend: str) -> None:
    x, alpha = _tensors()
    _results(x, alpha, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _results(x, alpha, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_32_bits(backend: str, memory_format: torch.memory_format) -> None:
    size = (1368, 32, 224, 224)  # 2.2e9 elements
    x = torch.empty(size, device="cuda", dtype=torch.bfloat16, memory_format=memory_format)
    x.normal_()
    alpha = torch.randn(3, device="cuda")
    names = ("skip_connect", "max_pool_3x3", "avg_pool_3x3")
    out = fused_meta_pool(x, alpha, names, backend=backend)
    for image in (0, 684, 1367):
        part = x[image : image + 1].contiguous(memory_format=memory_format)
        assert torch.equal(
            out[image : image + 1], fused_meta_pool(part, alpha, names, backend=backend)
        )


def test_compiled(backend: str) -> None:
    x, alpha = _tensors()
    compiled = torch.compile(_results, fullgraph=False)
    torch.testing.assert_close(compiled(x, alpha, backend), _results(x, alpha, backend))
