"""Poolings side by side: what they stand in for, the module, and what both refuse."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metapool_kernels import MultiPool2d, fused_multi_pool, numpy_api
from metapool_kernels.convertible import to_plain
from metapool_kernels.ops import PREFIXES
from metapool_kernels.plain import Form, SideBySide
from tests import cases
from tests.backends import COMPILED, DEVICE, require
from tests.cases import CANDIDATES, SHAPES

PYRAMID = CANDIDATES["pyramid"]
MAXIMA = tuple(f"max_pool_{size}x{size}" for size in (3, 5, 7, 9, 11, 13, 15))


def _on_backend(x: Tensor, names: tuple[str, ...], backend: str, **options: object) -> Tensor:
    out: Tensor = fused_multi_pool(x.to(DEVICE), names, backend=backend, **options)  # type: ignore[arg-type]
    return out.to("cpu")


def _whole(size: cases.Size, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Whole numbers, many of them equal: their sums are exact in any order."""
    rng = torch.Generator().manual_seed(seed)
    return cases.LAYOUTS[layout](torch.randint(-4, 5, size, generator=rng).to(dtype))


def _windows(name: str) -> tuple[int, int]:
    height, width = name.removeprefix("max_pool_").split("x")
    return int(height), int(width)


def _maxima(x: Tensor, names: tuple[str, ...]) -> Tensor:
    windows = [_windows(name) for name in names]
    return torch.cat([F.max_pool2d(x, (h, w), 1, (h // 2, w // 2)) for h, w in windows], 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("names", [MAXIMA, MAXIMA[2:5], ("max_pool_1x9", *MAXIMA[:2])], ids=len)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["primes", "map7", "wide", "tall", "planes"])
def test_maxima_and_their_gradients_are_those_of_torch(
    backend: str, size: str, dtype: torch.dtype, layout: str, names: tuple[str, ...]
) -> None:
    """Number for number, also of which of equal elements a gradient goes to."""
    n, c, h, w = SHAPES[size][0]
    x = _whole((n, c, h, w), dtype, layout, 0)
    grad_out = _whole((n, len(names) * c, h, w), dtype, layout, 1)
    results = []
    for function in (lambda x: _on_backend(x, names, backend), lambda x: _maxima(x, names)):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, grad_out)))
    for got, right in zip(*results, strict=True):
        assert torch.equal(got, right)


class _Pyramid(nn.Module):
    """Spatial pyramid pooling as the YOLO family has it: three times the same window, nested."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return torch.cat(maps, 1)


class _Network(nn.Module):
    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(32, 5, 1)
        self.pyramid = pyramid

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.pyramid(self.before(x).relu())).mean((2, 3))
        return out


def _losses(pyramid: nn.Module) -> list[float]:
    torch.manual_seed(0)
    network = _Network(pyramid).double()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    x, labels = torch.randn(4, 3, 16, 15).double(), torch.tensor([0, 1, 2, 4])
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_the_same_way(native: str) -> None:
    """Swapped in for nested poolings, a network learns the same from the same start."""
    ours, theirs = _losses(MultiPool2d(PYRAMID, backend=native)), _losses(_Pyramid())
    assert theirs[-1] < theirs[0] / 2
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_x_alone_is_saved(native: str, layout: str) -> None:
    x = cases.LAYOUTS[layout](torch.randn(2, 5, 9, 8)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        fused_multi_pool(x, PYRAMID, backend=native)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@pytest.mark.parametrize("name", [name for name in COMPILED if name != "triton"])
def test_one_op_gives_all_of_them(name: str) -> None:
    ops = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            ops.append(func.name().split("::")[-1])
            return func(*args, **kwargs or {})

    x, backend = torch.randn(2, 5, 9, 8, device=DEVICE), require(name)
    with Notes():
        fused_multi_pool(x, PYRAMID, backend=backend)
    assert ops == [f"{PREFIXES[name]}meta_pool_fwd"]


def test_without_a_batch(backend: str) -> None:
    x = torch.randn(3, 9, 8)
    out = _on_backend(x, PYRAMID, backend)
    assert torch.equal(out, _on_backend(x[None], PYRAMID, backend)[0])
    assert out.shape == (12, 9, 8)


def test_nothing_has_a_gradient_of_zeros(backend: str) -> None:
    x = torch.full((1, 2, 4, 5), torch.nan, requires_grad=True)
    out = _on_backend(x, ("none", "none"), backend)
    assert torch.equal(out, torch.zeros(1, 4, 4, 5))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_gradients_of_half_precision_are_rounded_once(backend: str) -> None:
    """What two averages send back nearly cancels: rounded one by one, nothing would be left."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = _on_backend(x, ("avg_pool_3x3", "avg_pool_5x5"), backend)
    grad_out = torch.tensor([9.0625, -25.0], dtype=torch.bfloat16).view(1, 2, 1, 1)
    (grad,) = torch.autograd.grad(out, x, grad_out)
    assert grad.item() == pytest.approx(9.0625 / 9 - 1, rel=0.01)


MODULES = {
    "pyramid": lambda: MultiPool2d(PYRAMID),
    "stepping": lambda: MultiPool2d(
        ("avg_pool_3x5", "max_pool_9x9", "none", "avg_pool_3x5"),
        stride=(2, 1),
        count_include_pad=False,
    ),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("form", [Form(), Form(None, None, False)], ids=["strips", "whole"])
def test_plain_module(name: str, form: Form) -> None:
    module, x = MODULES[name](), torch.randn(2, 3, 14, 12)
    plain = module.to_torch(form)
    assert isinstance(plain, SideBySide)
    torch.testing.assert_close(plain(x), module(x))
    torch.testing.assert_close(plain(x[0]), module(x[0]))


def test_plain_model_keeps_hooks() -> None:
    module = MODULES["pyramid"]()
    module.register_forward_hook(lambda _, inputs, out: 2 * out)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), module), torch.randn(2, 3, 14, 12)
    expected = model(x)
    torch.testing.assert_close(to_plain(model)(x), expected)
    assert not any(isinstance(part, MultiPool2d) for part in model.modules())


def test_a_forward_of_its_own_has_no_plain_form() -> None:
    class Louder(MultiPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="Louder has a forward of its own"):
        Louder(PYRAMID).to_torch()


@pytest.mark.parametrize("name", MODULES)
def test_module_is_copied_pickled_traced_and_exported(name: str) -> None:
    module, x = MODULES[name](), torch.randn(2, 3, 14, 12)
    expected = module(x)
    assert not module.state_dict()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(module))(x), expected)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert str(module.candidates) in repr(module)


BAD = {
    "no tensor": (
        ([[1.0]], PYRAMID),
        TypeError,
        r"fused_multi_pool\(\): argument 'x' \(position 1",
    ),
    "integers": (
        (torch.ones(1, 1, 3, 3, dtype=torch.int32), PYRAMID),
        NotImplementedError,
        "\"fused_multi_pool\" not implemented for 'int32'",
    ),
    "sparse": (
        (torch.ones(1, 1, 3, 3).to_sparse(), PYRAMID),
        NotImplementedError,
        "fused_multi_pool: x should be a dense tensor, got layout torch.sparse_coo",
    ),
    "a row": ((torch.ones(3, 3), PYRAMID), RuntimeError, r"x should be 3-D .* got \[3, 3\]"),
    "no columns": ((torch.ones(1, 1, 3, 0), PYRAMID), RuntimeError, "non-zero channels, height"),
    "one string": ((torch.ones(1, 1, 3, 3), "max_pool_3x3"), TypeError, "a sequence of str"),
    "nothing": ((torch.ones(1, 1, 3, 3), ()), ValueError, "candidates is empty"),
    "an even window": ((torch.ones(1, 1, 3, 3), ("max_pool_4x4",)), ValueError, "window of 4x4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fused_multi_pool(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride should be"),
        ({"stride": 2}, ValueError, "skip_connect keeps the size of x and needs stride 1"),
        ({"count_include_pad": 1}, TypeError, "count_include_pad should be a bool"),
        ({"backend": "opencl"}, ValueError, "backend should be None or one of"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    for call in (lambda: fused_multi_pool(torch.ones(1, 1, 3, 3), PYRAMID, **options),
                 lambda: MultiPool2d(PYRAMID, **options)):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.usefixtures("numpy_module")
def test_bad_arrays() -> None:
    x = torch.ones(2, 3, 5, 4).numpy()
    with pytest.raises(ValueError, match="x should be 4-D"):
        numpy_api.multi_pool(x[0], PYRAMID)
    with pytest.raises(ValueError, match=r"values should have shape \(2, 3, 5, 4\)"):
        numpy_api.multi_pool(x, PYRAMID, values=x[..., 1:])
    with pytest.raises(ValueError, match=r"grad_out should have shape \(2, 12, 5, 4\)"):
        numpy_api.multi_pool_grad(x, x, PYRAMID)
