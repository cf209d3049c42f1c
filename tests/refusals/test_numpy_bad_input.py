"""The NumPy entry points: what they refuse, in which words, and that nothing is changed."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metapool_kernels import DEFAULT_CANDIDATES, numpy_api

pytestmark = pytest.mark.usefixtures("numpy_module")

Array = np.ndarray[Any, Any]


def _ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape or (2, 5, 4, 6), dtype)


def _hidden(array: Array) -> Array:
    masked: Array = np.ma.masked_array(array, array > 0)
    return masked


FLOATS = "should be a NumPy array of float16, float32 or float64, got"

# id: (what differs from a good call, class of the error, parts of its message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "x a list": ({"x": [[[[1.0]]]]}, TypeError, (f"x {FLOATS} list",)),
    "x None": ({"x": None}, TypeError, (f"x {FLOATS} NoneType",)),
    "x a number": ({"x": 1.0}, TypeError, (f"x {FLOATS} float",)),
    **{
        f"x {np.dtype(dtype)}": (
            {"x": _ones(dtype=dtype)}, TypeError, (f"x {FLOATS} {np.dtype(dtype)}",)
        )
        for dtype in (np.int8, np.uint8, np.int64, np.bool_, np.complex64, np.complex128,
                      np.longdouble, np.object_, np.dtype("U1"), np.dtype("m8[s]"))
    },
    "x of records": ({"x": np.zeros((2, 5, 4, 6), [("a", np.float32)])}, TypeError, ("x should",)),
    "x masked": ({"x": _hidden(_ones())}, TypeError, (f"x {FLOATS} MaskedArray",)),
    "weights masked": ({"weights": _hidden(_ones(7))}, TypeError, ("weights", "MaskedArray")),
    "values masked": ({"values": _hidden(_ones())}, TypeError, ("values", "MaskedArray")),
    "x 0-D": ({"x": np.array(1.0)}, ValueError, ("x should be 4-D", "got shape ()")),
    "x 2-D": ({"x": _ones(4, 6)}, ValueError, ("x should be 4-D", "(4, 6)")),
    "x 3-D": ({"x": _ones(5, 4, 6)}, ValueError, ("x should be 4-D", "(5, 4, 6)")),
    "x 5-D": ({"x": _ones(1, 2, 5, 4, 6)}, ValueError, ("x should be 4-D",)),
    "C is 0": ({"x": _ones(2, 0, 4, 6)}, ValueError, ("non-zero", "(2, 0, 4, 6)")),
    "H is 0": ({"x": _ones(2, 5, 0, 6)}, ValueError, ("non-zero", "(2, 5, 0, 6)")),
    "W is 0": ({"x": _ones(2, 5, 4, 0)}, ValueError, ("non-zero", "(2, 5, 4, 0)")),
    "weights a list": ({"weights": [1.0] * 7}, TypeError, ("weights", "floats, got list")),
    "weights int": ({"weights": _ones(7, dtype=np.int64)}, TypeError, ("floats, got int64",)),
    "weights complex": ({"weights": _ones(7, dtype=complex)}, TypeError, ("got complex128",)),
    "weights objects": ({"weights": _ones(7, dtype=object)}, TypeError, ("got object",)),
    "too few weights": ({"weights": _ones(6)}, ValueError, ("7 elements not 6", "shape (6,)")),
    "too many weights": ({"weights": _ones(5, 8)}, ValueError, ("7 elements not 8", "(5, 8)")),
    "no weights": ({"weights": _ones(0)}, ValueError, ("7 elements not 0",)),
    **{
        f"weights {shape}": (
            {"weights": _ones(*shape)}, ValueError,
            ("(K,), (C, K), (N, 1, K) or (N, C, K)", "(2, 5, 4, 6)", f"got {shape}"),
        )
        for shape in ((1, 7), (2, 7), (1, 1, 7), (1, 5, 7), (2, 2, 7), (1, 2, 5, 7))
    },
    "weights 0-D": ({"weights": np.array(1.0)}, ValueError, ("(K,)", "got ()")),
    "values narrower": ({"values": _ones(2, 5, 4, 5)}, ValueError,
                        ("values should have shape (2, 5, 4, 6)", "got (2, 5, 4, 5)")),
    "values 3-D": ({"values": _ones(5, 4, 6)}, ValueError, ("values should be 4-D",)),
    "values float64": ({"values": _ones(dtype=np.float64)}, TypeError,
                       ("values should have dtype float32", "got float64")),
    "values a list": ({"values": [1.0]}, TypeError, (f"values {FLOATS} list",)),
    "one string": ({"candidates": "max_pool_3x3"}, TypeError, ("sequence of str",)),
    "a number among names": ({"candidates": ("none", 3)}, TypeError, ("sequence of str", "int")),
    "unknown name": ({"candidates": ("conv",) * 7}, ValueError, ("'conv'", "skip_connect")),
    "even window": ({"candidates": ("max_pool_4x3",) * 7}, ValueError, ("max_pool_4x3", "odd")),
    "large window": ({"candidates": ("avg_pool_3x17",) * 7}, ValueError, ("from 1 to 15",)),
    "no candidate": ({"candidates": ()}, ValueError, ("candidates is empty",)),
    "stride 0": ({"stride": 0}, ValueError, ("stride", "got 0")),
    "stride -1": ({"stride": -1}, ValueError, ("stride", "got -1")),
    "stride float": ({"stride": 1.0}, TypeError, ("stride", "got 1.0")),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, ("stride", "got (1, 1, 1)")),
    "skip_connect and stride 2": ({"stride": 2}, ValueError, ("skip_connect", "stride 2")),
    "flag a number": ({"count_include_pad": 1}, TypeError, ("count_include_pad", "bool, got 1")),
}  # fmt: skip


def _arrays(arguments: dict[str, Any]) -> list[bytes]:
    values = arguments.values()
    return [a.tobytes() for a in values if isinstance(a, np.ndarray) and a.dtype != np.object_]


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, error, parts = BAD[name]
    arguments = {"x": _ones(), "weights": _ones(7)} | changes
    before = _arrays(arguments)
    calls: list[Callable[..., object]] = [
        numpy_api.meta_pool,
        lambda **kwargs: numpy_api.meta_pool_grad(_ones(), **kwargs),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            call(**arguments)
        assert type(raised.value) is error
        assert not [part for part in parts if part not in str(raised.value)]
        assert _arrays(arguments) == before


@pytest.mark.parametrize(
    ("grad_out", "error", "message"),
    [
        (_ones(2, 5, 4, 5), ValueError, r"grad_out should have shape \(2, 5, 4, 6\)"),
        (_ones(5, 4, 6), ValueError, "grad_out should be 4-D"),
        (_ones(dtype=np.float64), TypeError, "grad_out should have dtype float32 as x"),
        (_hidden(_ones()), TypeError, "grad_out .* got MaskedArray"),
        ([1.0], TypeError, "grad_out .* got list"),
    ],
    ids=["narrower", "3-D", "float64", "masked", "list"],
)
def test_bad_gradient(grad_out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        numpy_api.meta_pool_grad(grad_out, _ones(), _ones(7))


def test_the_gradient_of_a_strided_call_has_the_size_of_its_output() -> None:
    names = DEFAULT_CANDIDATES[1:]
    with pytest.raises(ValueError, match=r"grad_out should have shape \(2, 5, 2, 2\)"):
        numpy_api.meta_pool_grad(_ones(), _ones(), _ones(6), names, stride=(2, 3))
    grads = numpy_api.meta_pool_grad(_ones(2, 5, 2, 2), _ones(), _ones(6), names, stride=(2, 3))
    assert [grad.shape for grad in grads] == [(2, 5, 4, 6), (6,)]


def test_what_cannot_be_written_to_is_only_read() -> None:
    arrays = [_ones(), _ones(7), _ones()]
    for array in arrays:
        array.flags.writeable = False
    x, weights, grad_out = arrays
    out = numpy_api.meta_pool(x, weights)
    grads = numpy_api.meta_pool_grad(grad_out, x, weights, values=x)
    assert all(result.flags.writeable for result in (out, *grads))
    assert not any(np.shares_memory(out, array) for array in arrays)


def test_no_image_gives_no_output_and_zero_gradients() -> None:
    empty = _ones(0, 5, 4, 6)
    assert numpy_api.meta_pool(empty, _ones(7)).shape == (0, 5, 4, 6)
    grad_x, grad_weights = numpy_api.meta_pool_grad(empty, empty, _ones(7))
    assert grad_x.shape == (0, 5, 4, 6)
    np.testing.assert_array_equal(grad_weights, np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"statistics": (np.ones((7, 4)), np.ones((7, 5)))}, ValueError, "(7, 5), (K, C)"),
        ({"statistics": (np.ones((5, 7)), np.ones((5, 7)))}, ValueError, "got (5, 7)"),
        ({"statistics": ([[0.0]], np.ones((7, 5)))}, TypeError, "floats, got list"),
        ({"eps": 0.0}, ValueError, "eps should be above 0"),
        ({"eps": "small"}, TypeError, "eps should be a number"),
        ({"x": _ones(1, 5, 1, 1)}, ValueError, "more than one value per channel"),
        ({"x": _ones(5, 4, 6)}, ValueError, "x should be 4-D"),
        ({"weights": _ones(6)}, ValueError, "7 elements not 6"),
    ],
    ids=["channels", "turned", "list", "no eps", "eps a word", "one value", "3-D", "weights"],
)
def test_bad_normalised_calls(change: dict[str, Any], error: type[Exception], words: str) -> None:
    call = {"x": _ones(), "weights": _ones(7)} | change
    grad_out = np.ones_like(call["x"])
    calls: list[Callable[..., object]] = [
        numpy_api.normalized_meta_pool,
        lambda **kwargs: numpy_api.normalized_meta_pool_grad(grad_out, **kwargs),
    ]
    for function in calls:
        with pytest.raises(error, match=re.escape(words)):
            function(**call)
