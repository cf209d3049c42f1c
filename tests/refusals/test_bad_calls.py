"""A call that is refused changes nothing, and is refused in the same words under torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from metapool_kernels.dispatch import BACKENDS as ALL_BACKENDS
from tests.refusals.test_bad_input import BAD, NAMES

Call = Callable[..., Tensor]


def _arguments(changes: dict[str, Any]) -> dict[str, Any]:
    """A call of its own, with history: leaves with gradients, and versions over zero."""
    good = {"x": torch.ones(2, 5, 4, 6), "alpha": torch.ones(3), "candidates": NAMES}
    arguments = good | changes
    for name in ("x", "alpha"):
        value = arguments[name]
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            arguments[name] = value.clone()
            arguments[name].copy_(value)  # as if it had been trained: a version over zero
            if value.is_floating_point() and value.element_size() > 1:
                arguments[name].grad = torch.full_like(value, 7.0)
                arguments[name].requires_grad_()
    return arguments


def _state(arguments: dict[str, Any]) -> list[object]:
    """All that a call could leave behind, in its tensors and in torch."""
    tensors = [
        (bytes(t.untyped_storage()), t.shape, t.stride(), t.dtype, t._version, t.requires_grad,
         t.grad_fn, None if t.grad is None else (bytes(t.grad.untyped_storage()), t.grad._version))
        for t in arguments.values()
        if isinstance(t, Tensor) and t.layout is torch.strided and not t.is_meta
    ]  # fmt: skip
    return [
        tensors,
        bytes(torch.get_rng_state().untyped_storage()),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


def _refused(call: Call, name: str, backend: str) -> None:
    changes, error, parts = BAD[name]
    arguments = _arguments(changes)
    before = _state(arguments)
    with pytest.raises(error) as raised:
        call(backend=backend, **arguments)
    assert type(raised.value) is error
    assert not [part for part in parts if part not in str(raised.value)]
    assert _state(arguments) == before


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_changed(backend: str, name: str) -> None:
    _refused(fused_meta_pool, name, backend)


@pytest.mark.parametrize("name", BAD)
def test_the_answer_is_the_same_under_compile(backend: str, name: str) -> None:
    """The trace meets the error and gives up, and the call is made as it was written."""
    torch._dynamo.reset()
    counters.clear()
    _refused(torch.compile(fused_meta_pool, backend="eager"), name, backend)
    assert counters["frames"]["total"] > 0, "nothing was traced"


FULLGRAPH = ("x 2-D", "too many elements", "alpha float64", "one string", "stride 0")


@pytest.mark.parametrize("name", FULLGRAPH)
def test_without_a_graph_break_the_error_is_torchs_and_holds_ours(backend: str, name: str) -> None:
    """With fullgraph=True torch may not fall back on the call: it quotes what was raised."""
    torch._dynamo.reset()
    changes, error, parts = BAD[name]
    arguments = _arguments(changes)
    before = _state(arguments)
    compiled = torch.compile(fused_meta_pool, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        compiled(backend=backend, **arguments)
    assert error.__name__ in str(raised.value)
    assert not [part for part in parts if part not in str(raised.value).replace("\\'", "'")]
    assert _state(arguments) == before


def test_the_state_that_is_compared_would_show_a_change() -> None:
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda a: a["x"].data.view(-1)[3].add_(1),
        lambda a: a["alpha"].detach().add_(0),
        lambda a: a["x"].grad.add_(0),
        lambda a: a["alpha"].requires_grad_(False),
        lambda a: torch.rand(1),
    ]
    for change in changes:
        arguments = _arguments({})
        before = _state(arguments)
        assert _state(arguments) == before
        change(arguments)
        assert _state(arguments) != before


UNAVAILABLE = {
    name: reason for name, why in ALL_BACKENDS.items() if (reason := why(torch.ones(1))) is not None
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_backend_that_is_not_available_is_refused_under_compile_too(name: str) -> None:
    torch._dynamo.reset()
    arguments = _arguments({})
    before = _state(arguments)
    with pytest.raises(RuntimeError) as raised:
        torch.compile(fused_meta_pool, backend="eager")(backend=name, **arguments)
    assert str(raised.value) == f"backend {name!r} is not available: {UNAVAILABLE[name]}"
    assert _state(arguments) == before


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3], ids=repr)
def test_an_unknown_backend_is_refused_under_compile_too(name: object) -> None:
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="backend should be None or one of"):
        torch.compile(fused_meta_pool, backend="eager")(backend=name, **_arguments({}))


GOOD = MetaPool2d()

MODULES: dict[str, tuple[Callable[..., object], type[Exception], str]] = {
    "no channels": (lambda: MetaPool2d(channels=0), ValueError, "channels .* at least 1, got 0"),
    "negative channels": (lambda: MetaPool2d(channels=-1), ValueError, "at least 1, got -1"),
    "channels float": (lambda: MetaPool2d(channels=2.5), TypeError, "an int, got 2.5"),
    "channels bool": (lambda: MetaPool2d(channels=True), TypeError, "an int, got True"),
    "dtype integer": (lambda: MetaPool2d(dtype=torch.int64), ValueError, "bfloat16, got torch.int"),
    "dtype complex": (lambda: MetaPool2d(dtype=torch.complex64), ValueError, "got torch.complex"),
    "dtype str": (lambda: MetaPool2d(dtype="float"), ValueError, "dtype .* got 'float'"),
    "candidates None": (lambda: MetaPool2d(None), TypeError, "sequence of str"),
    "candidates a set": (lambda: MetaPool2d({"none"}), TypeError, "sequence of str"),
    "candidates drained": (lambda: MetaPool2d(n for n in NAMES), TypeError, "sequence of str"),
    "flag": (lambda: MetaPool2d(count_include_pad=1), TypeError, "count_include_pad"),
    "backend": (lambda: MetaPool2d(backend="gpu"), ValueError, "backend should be"),
    "extras a list": (lambda: MetaPool2d(extra_candidates=[torch.nn.Identity()]), TypeError,
                      "should map names to modules"),
    "extra named by a number": (lambda: MetaPool2d(extra_candidates={3: torch.nn.Identity()}),
                                ValueError, "named by letters.* got 3"),
    "extra named as a method": (lambda: MetaPool2d(extra_candidates={"keys": torch.nn.Identity()}),
                                ValueError, "an attribute of nn.ModuleDict"),
    "extra named as a flag": (lambda: MetaPool2d(extra_candidates={"training": torch.nn.ReLU()}),
                              ValueError, "an attribute of nn.ModuleDict"),
    "keep floats": (lambda: GOOD.reduce([1.5]), TypeError, r"ints, got \[1.5\]"),
    "keep one number": (lambda: GOOD.reduce(3), TypeError, "ints, got 3"),
    "keep text": (lambda: GOOD.reduce("01"), TypeError, "ints, got '01'"),
    "enhancer of no channels": (lambda: SpatialEnhancer(0), ValueError, "channels"),
    "enhancer of text": (lambda: SpatialEnhancer("8"), TypeError, "channels"),
    "enhancer of None": (lambda: SpatialEnhancer(None), TypeError, "channels"),
    "per_channel a number": (lambda: SpatialEnhancer(8, per_channel=3), TypeError, "per_channel"),
    "enhancer's stride": (lambda: SpatialEnhancer(8, stride=2), ValueError, "skip_connect"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_not_made_from_what_cannot_be(name: str) -> None:
    make, error, message = MODULES[name]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message) as raised:
        make()
    assert type(raised.value) is error
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_for_other_channels_says_so(backend: str) -> None:
    module = MetaPool2d(channels=4, backend=backend)
    with pytest.raises(RuntimeError, match=r"\[3, 7\].* for x of shape \[1, 3, 5, 5\], got \[4, 7"):
        module(torch.ones(1, 3, 5, 5))
