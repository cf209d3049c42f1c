"""The NumPy entry points: the same core on arrays, a third witness beside torch and the truth."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from metapool_kernels import fused_normalized_meta_pool, numpy_api
from tests import cases, judge
from tests.cases import CANDIDATES, Case

pytestmark = pytest.mark.usefixtures("numpy_module")

DTYPES = (torch.float32, torch.float64, torch.float16)
RAW = [case for case in cases.GRID if case.dtype in DTYPES and case.alpha_dtype is None]


def _options(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "count_include_pad": case.count_include_pad}


def _weights(alpha: torch.Tensor, case: Case) -> torch.Tensor:
    wide = alpha.to(judge.accumulation(case.dtype))
    return torch.softmax(wide, -1) if case.normalize == "softmax" else wide


def _raw(case: Case) -> Case:
    """The case with its softmax taken out: the arrays' functions get the weights themselves."""
    return replace(case, normalize=None)


@pytest.mark.parametrize("case", RAW[::2], ids=str)
def test_output_and_gradients_are_right(case: Case) -> None:
    x, alpha, grad_out = case.tensors()
    weights = _weights(alpha, case)
    arrays = x.numpy(), weights.numpy()
    names, options = case.candidates, _options(case)
    if case.form == "stack":
        out = numpy_api.multi_pool(arrays[0], names, **options)
        grads = [numpy_api.multi_pool_grad(grad_out.numpy(), arrays[0], names, **options)]
    elif case.form == "normalized":
        out = numpy_api.normalized_meta_pool(*arrays, names, **options).out
        grads = list(
            numpy_api.normalized_meta_pool_grad(grad_out.numpy(), *arrays, names, **options)
        )
        assert grads[1].shape == weights.shape and grads[1].dtype == weights.numpy().dtype
    else:
        out = numpy_api.meta_pool(*arrays, names, **options)
        grads = list(numpy_api.meta_pool_grad(grad_out.numpy(), *arrays, names, **options))
        assert grads[1].shape == weights.shape and grads[1].dtype == weights.numpy().dtype
    assert out.flags.c_contiguous and grads[0].flags.c_contiguous
    found = dict(zip(judge.ALL, (out, *grads), strict=False))
    results = {name: torch.from_numpy(array) for name, array in found.items()}
    right = judge.right_results(_raw(case), x, weights, grad_out)
    plain = judge.run(judge.eager, _raw(case), x, weights, grad_out)
    sizes = judge.magnitudes(_raw(case), x, weights, grad_out, judge.ALL)
    for name, got in results.items():
        wide = judge.accumulation(case.dtype)
        count = judge.terms(case, name)
        judge.compare(name, got, right[name], plain[name], sizes[name], count, wide)


@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize("names", ["default", "max", "avg"])
def test_torch_and_numpy_agree_to_the_bit(native: str, names: str, data: str) -> None:
    case = Case((3, 4, 9, 19), data=data, candidates=CANDIDATES[names], normalize=None)
    x, alpha, grad_out = case.tensors()
    theirs = judge.run(judge.fused(native), case, x, alpha, grad_out)
    arrays = x.detach().numpy(), alpha.detach().numpy()
    out = numpy_api.meta_pool(*arrays, case.candidates)
    grad_x, grad_weights = numpy_api.meta_pool_grad(grad_out.numpy(), *arrays, case.candidates)
    ours = {"out": out, "grad_x": grad_x, "grad_alpha": grad_weights}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), strict=True)


@pytest.mark.parametrize("follows", [True, False], ids=["of the batch", "given"])
def test_normalised_as_by_torch(native: str, follows: bool) -> None:
    """Statistics, too, and the gradients where these do not follow x."""
    names = ("skip_connect", "max_pool_3x3", "avg_pool_5x5", "none")
    case = Case((3, 4, 9, 19), dtype=torch.float64, candidates=names, normalize=None)
    x, alpha, grad_out = case.tensors()
    mean, variance = torch.rand(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    statistics = None if follows else (mean.numpy().copy(), variance.numpy().copy())
    leaves = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    out = fused_normalized_meta_pool(
        *leaves, names, mean, variance, training=follows, momentum=1.0, normalize=None,
        backend=native,
    )  # fmt: skip
    theirs = torch.autograd.grad(out, leaves, grad_out)
    arrays = x.numpy(), alpha.numpy()
    ours = numpy_api.normalized_meta_pool(*arrays, names, statistics=statistics)
    grads = numpy_api.normalized_meta_pool_grad(
        grad_out.numpy(), *arrays, names, statistics=statistics
    )
    wide = torch.float64
    for got, right in ((ours.out, out.detach()), *zip(grads, theirs, strict=True)):
        torch.testing.assert_close(torch.from_numpy(got), right, rtol=1e-12, atol=1e-12)
    for got, running in ((ours.mean, mean), (ours.variance, variance)):
        unbiased = 3 * 9 * 19 / (3 * 9 * 19 - 1) if follows and got is ours.variance else 1
        right = running[1:3].to(wide)
        torch.testing.assert_close(torch.from_numpy(got[1:3] * unbiased), right, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(ours.mean[[0, 3]], 0)
    np.testing.assert_array_equal(ours.variance[[0, 3]], 1)


def test_squares_that_float32_cannot_hold_are_normalised() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 7)).astype(np.float32) * np.float32(1e30)
    weights = np.ones(1, np.float32)
    out = numpy_api.normalized_meta_pool(x, weights, ("avg_pool_3x3",)).out
    np.testing.assert_allclose(out.var((0, 2, 3)), 1, rtol=1e-4)


VIEWS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "reversed": lambda a: a[:, ::-1, ::-1, ::-1],
    "stepped": lambda a: a[:, :, ::2, ::3],
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:1, :, :1], a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "odd strides": lambda a: _in_records(a),
    "another dtype object": lambda a: a.view(np.dtype(a.dtype.str, copy=True)),
}


def _in_records(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A field beside one byte, so that strides are no multiple of the item size."""
    records = np.zeros(a.shape, np.dtype([("byte", np.int8), ("value", a.dtype)]))
    records["value"] = a
    view: np.ndarray[Any, Any] = records["value"]
    return view


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_array(view: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = VIEWS[view](rng.standard_normal((2, 3, 8, 9)).astype(dtype))
    weights = rng.standard_normal(7)
    grad_out = VIEWS[view](rng.standard_normal((2, 3, 8, 9)).astype(dtype))
    plain = (np.ascontiguousarray(a, dtype) for a in (x, grad_out))
    plain_x, plain_grad = plain
    before = x.tobytes()
    np.testing.assert_array_equal(
        numpy_api.meta_pool(x, weights), numpy_api.meta_pool(plain_x, weights)
    )
    ours = numpy_api.meta_pool_grad(grad_out, x, weights)
    for a, b in zip(ours, numpy_api.meta_pool_grad(plain_grad, plain_x, weights), strict=True):
        np.testing.assert_array_equal(a, b)
    assert x.tobytes() == before


def test_values() -> None:
    """values moves through the windows that x chose."""
    x = np.array([[[[1.0, 3.0, 2.0]]]], np.float32)
    values = np.array([[[[10.0, 20.0, 30.0]]]], np.float32)
    names = ("max_pool_1x3", "avg_pool_1x3")
    out = numpy_api.meta_pool(x, np.array([1.0, 0.5]), names, values=values)
    np.testing.assert_allclose(out.ravel(), [20 + 5, 20 + 10, 20 + 25 / 3], rtol=1e-6)
    grad_out = np.ones_like(x)
    grad, grad_weights = numpy_api.meta_pool_grad(
        grad_out, x, np.array([1.0, 0.0]), names, values=values
    )
    np.testing.assert_allclose(grad.ravel(), [0, 3, 0])
    np.testing.assert_allclose(grad_weights, [60, (30 + 60 + 50) / 3], rtol=1e-6)


def _ones(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape or (2, 5, 4, 6), dtype)


BAD: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = {
    "x a list": ({"x": [[[[1.0]]]]}, TypeError),
    "weights a list": ({"weights": [1.0] * 7}, TypeError),
    "x int": ({"x": _ones(dtype=np.int64)}, TypeError),
    "x bool": ({"x": _ones(dtype=np.bool_)}, TypeError),
    "x complex": ({"x": _ones(dtype=np.complex64)}, TypeError),
    "x longdouble": ({"x": _ones(dtype=np.longdouble)}, TypeError),
    "x 3-D": ({"x": _ones(5, 4, 6)}, ValueError),
    "C is 0": ({"x": _ones(2, 0, 4, 6)}, ValueError),
    "H is 0": ({"x": _ones(2, 5, 0, 6)}, ValueError),
    "W is 0": ({"x": _ones(2, 5, 4, 0)}, ValueError),
    "weights of another K": ({"weights": _ones(6)}, ValueError),
    "weights (1, K)": ({"weights": _ones(1, 7)}, ValueError),
    "weights (N, K)": ({"weights": _ones(2, 7)}, ValueError),
    "weights (1, 1, K)": ({"weights": _ones(1, 1, 7)}, ValueError),
    "weights (1, C, K)": ({"weights": _ones(1, 5, 7)}, ValueError),
    "weights (N, 2, K)": ({"weights": _ones(2, 2, 7)}, ValueError),
    "weights 4-D": ({"weights": _ones(1, 2, 5, 7)}, ValueError),
    "weights 0-D": ({"weights": np.array(1.0)}, ValueError),
    "values of another shape": ({"values": _ones(2, 5, 4, 5)}, ValueError),
    "values of another dtype": ({"values": _ones(dtype=np.float64)}, (TypeError, ValueError)),
    "values a list": ({"values": [1.0]}, TypeError),
    "one string": ({"candidates": "max_pool_3x3"}, TypeError),
    "unknown name": ({"candidates": ("conv",) * 7}, ValueError),
    "stride 0": ({"stride": 0}, ValueError),
    "stride float": ({"stride": 1.0}, TypeError),
    "skip and stride 2": ({"stride": 2}, ValueError),
    "flag": ({"count_include_pad": 1}, TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, error = BAD[name]
    arguments = {"x": _ones(), "weights": _ones(7)} | changes
    with pytest.raises(error) as raised:
        numpy_api.meta_pool(**arguments)
    assert str(raised.value)
    with pytest.raises(error):
        numpy_api.meta_pool_grad(_ones(), **arguments)


@pytest.mark.parametrize(
    "grad_out", [_ones(2, 5, 4, 5), _ones(5, 4, 6), _ones(dtype=np.float64), [1.0]], ids=str
)
def test_bad_gradient(grad_out: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        numpy_api.meta_pool_grad(grad_out, _ones(), _ones(7))


def test_instruction_sets() -> None:
    names = numpy_api.isa_names()
    assert names[0] == "baseline"
    assert numpy_api.active_isa() in names
