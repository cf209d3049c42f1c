"""Every input that is refused: the class of the error, its message, and nothing changed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metapool_kernels import MetaPool2d, fused_meta_pool
from metapool_kernels.dispatch import BACKENDS as ALL_BACKENDS
from metapool_kernels.dispatch import choose_backend
from tests.judge import bits

NAMES = ("skip_connect", "max_pool_3x3", "avg_pool_3x3")


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape or (2, 5, 4, 6)).to(dtype)


def _alpha(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape or (3,)).to(dtype)


# id: (what differs from a good call, class of the error, parts of its message)
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "x a list": ({"x": [[1.0]]}, TypeError,
                 ("'x' (position 1) should be a Tensor, not list",)),
    "x None": ({"x": None}, TypeError, ("'x' (position 1) should be a Tensor, not NoneType",)),
    "alpha a list": ({"alpha": [1.0, 1.0, 1.0]}, TypeError,
                     ("'alpha' (position 2) should be a Tensor, not list",)),
    "x 2-D": ({"x": _x(4, 6)}, RuntimeError, ("3-D", "4-D", "[4, 6]")),
    "x 5-D": ({"x": _x(1, 2, 3, 4, 5)}, RuntimeError, ("3-D", "4-D", "[1, 2, 3, 4, 5]")),
    "x 0-D": ({"x": torch.tensor(1.0)}, RuntimeError, ("3-D", "4-D", "[]")),
    "C is 0": ({"x": _x(2, 0, 4, 6)}, RuntimeError, ("non-zero", "[2, 0, 4, 6]")),
    "H is 0": ({"x": _x(2, 5, 0, 6)}, RuntimeError, ("non-zero", "[2, 5, 0, 6]")),
    "W is 0": ({"x": _x(2, 5, 4, 0)}, RuntimeError, ("non-zero", "[2, 5, 4, 0]")),
    "C is 0 of 3-D": ({"x": _x(0, 4, 6)}, RuntimeError, ("non-zero", "[0, 4, 6]")),
    **{
        f"x {dtype}": (
            {"x": _x(dtype=dtype)}, NotImplementedError,
            (f"\"fused_meta_pool\" not implemented for '{str(dtype).split('.')[1]}'",),
        )
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
                      torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "too many elements": ({"alpha": _alpha(4)}, RuntimeError,
                          ("alpha should contain 3 elements not 4",)),
    "too few elements": ({"alpha": _alpha(5, 2)}, RuntimeError,
                         ("alpha should contain 3 elements not 2", "[5, 2]")),
    "alpha 0-D": ({"alpha": torch.tensor(1.0)}, RuntimeError, ("alpha should contain 3 elements",)),
    "alpha (1, K)": ({"alpha": _alpha(1, 3)}, RuntimeError,
                     ("[3], [5, 3], [2, 1, 3] or [2, 5, 3]", "got [1, 3]", "[2, 5, 4, 6]")),
    "alpha (N, K)": ({"alpha": _alpha(2, 3)}, RuntimeError, ("got [2, 3]",)),
    "alpha (1, C, K)": ({"alpha": _alpha(1, 5, 3)}, RuntimeError, ("got [1, 5, 3]",)),
    "alpha (1, 1, K)": ({"alpha": _alpha(1, 1, 3)}, RuntimeError, ("got [1, 1, 3]",)),
    "alpha (C, 1, K)": ({"alpha": _alpha(5, 1, 3)}, RuntimeError, ("got [5, 1, 3]",)),
    "alpha 4-D": ({"alpha": _alpha(2, 5, 1, 3)}, RuntimeError, ("got [2, 5, 1, 3]",)),
    "alpha of N samples, x 3-D": ({"x": _x(5, 4, 6), "alpha": _alpha(2, 5, 3)}, RuntimeError,
                                  ("[3], [5, 3], [1, 1, 3] or [1, 5, 3]",)),
    "alpha float64": ({"alpha": _alpha(dtype=torch.float64)}, RuntimeError,
                      ("torch.float32", "torch.float64")),
    "alpha float16": ({"alpha": _alpha(dtype=torch.float16)}, RuntimeError,
                      ("torch.float32", "torch.float16")),
    "alpha float64, x bfloat16": (
        {"x": _x(dtype=torch.bfloat16), "alpha": _alpha(dtype=torch.float64)}, RuntimeError,
        ("torch.bfloat16", "torch.float64")),
    "alpha float16, x bfloat16": (
        {"x": _x(dtype=torch.bfloat16), "alpha": _alpha(dtype=torch.float16)}, RuntimeError,
        ("torch.bfloat16", "torch.float16")),
    "alpha integer": ({"alpha": _alpha(dtype=torch.int64)}, RuntimeError,
                      ("torch.float32", "torch.int64")),
    "alpha elsewhere": ({"alpha": _alpha().to("meta")}, RuntimeError,
                        ("same device", "x on cpu", "alpha on meta")),
    "no candidate": ({"candidates": ()}, ValueError, ("candidates is empty",)),
    "unknown name": ({"candidates": ("sep_conv_3x3",) * 3}, ValueError,
                     ("'sep_conv_3x3'", "skip_connect", "max_pool_{kh}x{kw}")),
    **{
        f"window {size}": (
            {"candidates": ("skip_connect", f"max_pool_{size}x3", "none")}, ValueError,
            (f"'max_pool_{size}x3'", "odd and from 1 to 15"),
        )
        for size in (2, 0, -3, 17)
    },
    "one string": ({"candidates": "max_pool_3x3"}, TypeError,
                   ("sequence of str", "'max_pool_3x3'")),
    "a number among names": ({"candidates": ("skip_connect", 3, "none")}, TypeError,
                             ("sequence of str", "int")),
    "skip_connect and stride 2": ({"stride": 2}, ValueError, ("skip_connect", "stride 2")),
    "skip_connect and stride (1, 2)": ({"stride": (1, 2)}, ValueError, ("skip_connect", "(1, 2)")),
    "stride 0": ({"stride": 0}, ValueError, ("stride", "got 0")),
    "stride -1": ({"stride": -1}, ValueError, ("stride", "got -1")),
    "stride (1, 0)": ({"stride": (1, 0)}, ValueError, ("stride", "got (1, 0)")),
    "stride 2**31": ({"stride": 2**31}, ValueError, ("stride", "got 2147483648")),
    "stride (1, 2**31)": ({"stride": (1, 2**31)}, ValueError, ("stride", "got (1, 2147483648)")),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, ("stride", "got (1, 1, 1)")),
    "stride of none": ({"stride": ()}, ValueError, ("stride", "got ()")),
    "stride float": ({"stride": 1.0}, TypeError, ("stride", "got 1.0")),
    "stride bool": ({"stride": True}, TypeError, ("stride", "got True")),
    "stride pair with float": ({"stride": (1, 2.0)}, TypeError, ("stride", "got (1, 2.0)")),
    "stride str": ({"stride": "1"}, TypeError, ("stride", "got '1'")),
    "normalize unknown": ({"normalize": "sigmoid"}, ValueError,
                          ("normalize", "'softmax'", "None", "'sigmoid'")),
    "normalize a bool": ({"normalize": True}, ValueError, ("normalize", "True")),
    "normalize a list": ({"normalize": ["softmax"]}, ValueError, ("normalize", "softmax")),
    "count_include_pad not a bool": ({"count_include_pad": 1}, TypeError,
                                     ("count_include_pad should be a bool", "1")),
    "x sparse": ({"x": _x().to_sparse()}, NotImplementedError, ("x", "dense", "to_dense()")),
    "x sparse csr": ({"x": _x(4, 6).to_sparse_csr()}, NotImplementedError, ("x", "dense")),
    "alpha sparse": ({"alpha": _alpha().to_sparse()}, NotImplementedError, ("alpha", "dense")),
}  # fmt: skip


def _good() -> dict[str, Any]:
    return {"x": _x(), "alpha": _alpha(), "candidates": NAMES}


def _tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [
        value
        for value in arguments.values()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
    ]


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.untyped_storage())


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend: str, name: str) -> None:
    changes, error, parts = BAD[name]
    arguments = _good() | changes
    before = [_bytes(tensor) for tensor in _tensors(arguments)]
    with pytest.raises(error) as raised:
        fused_meta_pool(backend=backend, **arguments)
    assert type(raised.value) is error
    for part in parts:
        assert part in str(raised.value)
    assert [_bytes(tensor) for tensor in _tensors(arguments)] == before


@pytest.mark.parametrize("name", BAD)
def test_bad_input_while_gradients_are_recorded(backend: str, name: str) -> None:
    """The answer is the same, and no half-built graph is left on the inputs."""
    changes, error, _ = BAD[name]
    arguments = _good() | changes
    leaves = [t for t in _tensors(arguments) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        with pytest.raises(error):
            fused_meta_pool(backend=backend, **arguments)
        assert all(leaf.grad is None and leaf.grad_fn is None for leaf in leaves)
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


EQUAL_BUT_WRONG = [
    ({"stride": 1}, {"stride": 1.0}),
    ({"stride": 1}, {"stride": True}),
    ({"stride": (1, 1)}, {"stride": (1.0, 1)}),
    ({"stride": (1, 1)}, {"stride": (1, True)}),
    ({"stride": (1, 1)}, {"stride": [1, 1.0]}),
    ({"count_include_pad": True}, {"count_include_pad": 1}),
]


@pytest.mark.parametrize("good, bad", EQUAL_BUT_WRONG, ids=str)
def test_a_good_call_does_not_open_the_door(
    backend: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    """Checks are not skipped because an equal value of the right type was checked before."""
    fused_meta_pool(backend=backend, **_good(), **good)
    with pytest.raises(TypeError):
        fused_meta_pool(backend=backend, **_good(), **bad)


def test_lists_are_fine(backend: str) -> None:
    out = fused_meta_pool(_x(), _alpha(), list(NAMES), stride=[1, 1], backend=backend)
    assert out.shape == _x().shape


def test_mkldnn(backend: str) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no mkldnn tensors")
    with pytest.raises(NotImplementedError, match="x should be a dense tensor"):
        fused_meta_pool(_x().to_mkldnn(), _alpha(), NAMES, backend=backend)


def test_the_good_call_is_good(backend: str) -> None:
    arguments = _good()
    out = fused_meta_pool(backend=backend, **arguments)
    assert out.shape == arguments["x"].shape
    assert torch.equal(bits(arguments["x"]), bits(_x()))


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3, ("cpu",)], ids=repr)
def test_unknown_backend(name: object) -> None:
    with pytest.raises(ValueError, match="backend should be None or one of") as raised:
        fused_meta_pool(_x(), _alpha(), NAMES, backend=name)  # type: ignore[arg-type]
    assert all(backend in str(raised.value) for backend in ALL_BACKENDS)


@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_a_forced_backend_runs_or_says_why_not(name: str) -> None:
    reason = ALL_BACKENDS[name](_x())
    if reason is None:
        assert fused_meta_pool(_x(), _alpha(), NAMES, backend=name).shape == _x().shape
        return
    with pytest.raises(RuntimeError) as raised:
        fused_meta_pool(_x(), _alpha(), NAMES, backend=name)
    assert f"backend {name!r} is not available" in str(raised.value)
    assert reason in str(raised.value)


def test_a_missing_library_is_an_error_only_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from metapool_kernels import native

    monkeypatch.setattr(native, "TORCH_OPS_PROBLEM", "it was never built; build it")
    with pytest.raises(RuntimeError, match="'cpu' is not available: it was never built; build it"):
        fused_meta_pool(_x(), _alpha(), NAMES, backend="cpu")
    assert fused_meta_pool(_x(), _alpha(), NAMES).shape == _x().shape


ALL = ("triton", "cuda", "cpu", "reference")


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cuda", ALL, "triton"),
        ("cuda", ("cuda", "cpu", "reference"), "cuda"),
        ("cuda", ("cpu", "reference"), "reference"),
        ("cpu", ALL, "cpu"),
        ("cpu", ("triton", "cuda", "reference"), "reference"),
        ("meta", ALL, "cpu"),
    ],
)
def test_the_first_that_can_run_is_chosen(
    monkeypatch: pytest.MonkeyPatch, device: str, available: tuple[str, ...], chosen: str
) -> None:
    for name in ALL_BACKENDS:
        reason = None if name in available else "it is not there"
        monkeypatch.setitem(ALL_BACKENDS, name, lambda x, reason=reason: reason)
    x = SimpleNamespace(device=torch.device(device))
    assert choose_backend(None, x) == chosen  # type: ignore[arg-type]


MODULE_BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "normalize": (lambda: MetaPool2d(normalize="sigmoid"), ValueError, "normalize"),
    "stride": (lambda: MetaPool2d(stride=2), ValueError, "skip_connect"),
    "stride float": (lambda: MetaPool2d(stride=1.5), TypeError, "stride"),  # type: ignore[arg-type]
    "candidates": (lambda: MetaPool2d(["conv"]), ValueError, "'conv'"),
    "one string": (lambda: MetaPool2d("max_pool_3x3"), TypeError, "sequence of str"),
    "no candidate": (lambda: MetaPool2d([]), ValueError, "empty"),
    "keep nothing": (lambda: MetaPool2d().reduce([]), ValueError, "keep"),
    "keep twice": (lambda: MetaPool2d().reduce([1, 1]), ValueError, "keep"),
    "keep what is not there": (lambda: MetaPool2d().reduce([7]), ValueError, "from 0 to 6"),
    "keep a negative position": (lambda: MetaPool2d().reduce([-1]), ValueError, "from 0 to 6"),
}


@pytest.mark.parametrize("name", MODULE_BAD)
def test_modules_refuse_when_they_are_made(name: str) -> None:
    make, error, message = MODULE_BAD[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("argument", ["backend", "count_include_pad"])
def test_modules_refuse_at_the_call_at_the_latest(argument: str) -> None:
    with pytest.raises((ValueError, TypeError), match=argument):
        MetaPool2d(**{argument: "gpu"})(_x())
