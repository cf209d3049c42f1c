"""PyTorch's generic checks of an operator, on an OpInfo of our own.

The classes are filled for each backend and dtype by the machinery that fills PyTorch's. What its
wheel holds of the checks is called: gradcheck with its flags, composite compliance, make_fx and
AOTAutograd. The others lie in PyTorch's repository alone, and are written here after their names:
``test_dtypes``, ``test_errors``, ``test_noncontiguous_samples``, ``test_neg_view``,
``test_cow_input`` and ``test_fake``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import cases
from tests.pytorch import opinfo, pytorch_internal
from tests.pytorch.opinfo import OP_DB

common_utils = pytorch_internal.load("common_utils")
device_type = pytorch_internal.load("common_device_type")
compliance = pytorch_internal.load("composite_compliance")
make_fx = pytorch_internal.load("optests.make_fx")
aot_autograd = pytorch_internal.load("optests.aot_autograd")

assert_close = torch.testing.assert_close
ops = device_type.ops
every_dtype = ops(OP_DB)
float32 = ops(OP_DB, allowed_dtypes=(torch.float32,))
float64 = ops(OP_DB, allowed_dtypes=(torch.float64,))


def _samples(op: Any, device: str, dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    samples = list(op.sample_inputs(device, dtype, requires_grad=grad))
    assert len(samples) == len(opinfo.SAMPLES) + 1
    yield from samples


def _call(op: Any, sample: Any) -> Tensor:
    out: Tensor = op(sample.input, *sample.args, **sample.kwargs)
    return out


def _gradients(out: Tensor, sample: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, (sample.input, sample.args[0]), cotangent)


class TestCommon(common_utils.TestCase):  # type: ignore[misc, name-defined]
    """Dtypes, errors, strides, lazily negated and lazily copied inputs."""

    @ops(OP_DB, dtypes=device_type.OpDTypes.none)
    def test_dtypes(self, device: str, op: Any) -> None:
        """Exactly the dtypes that are claimed work, forward and backward."""
        found = set()
        for dtype in common_utils.get_all_dtypes(include_complex32=True):
            x = torch.ones(1, 2, 3, 3, device=device).to(dtype)
            if dtype.is_floating_point or dtype.is_complex:
                x.requires_grad_()
            try:
                op(x, torch.ones(7, device=device)).sum().backward()
            except NotImplementedError:
                continue
            assert x.grad is not None
            found.add(dtype)
        assert found == set(op.supported_dtypes(device)) == set(cases.DTYPES)

    @ops(OP_DB, dtypes=device_type.OpDTypes.none)
    def test_errors(self, device: str, op: Any) -> None:
        for error in op.error_inputs(device):
            with pytest.raises(error.error_type, match=error.error_regex):
                _call(op, error.sample_input)

    @every_dtype
    def test_values(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, False):
            out = _call(op, sample)
            assert_close(out, _call(opinfo.definition, sample))
            assert out.dtype is dtype

    @every_dtype
    def test_noncontiguous_samples(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, True):
            other = sample.noncontiguous()
            outs = _call(op, sample), _call(op, other)
            assert_close(*outs)
            cotangent = torch.randn_like(outs[0])
            assert_close(
                _gradients(outs[0], sample, cotangent), _gradients(outs[1], other, cotangent)
            )

    @every_dtype
    def test_neg_view(self, device: str, dtype: torch.dtype, op: Any) -> None:
        """Tensors whose negation is noted and not done yet."""
        for sample in _samples(op, device, dtype, False):
            lazy = [torch._neg_view(-t).requires_grad_() for t in (sample.input, sample.args[0])]
            plain = [t.clone().requires_grad_() for t in (sample.input, sample.args[0])]
            outs = [op(*t, *sample.args[1:], **sample.kwargs) for t in (lazy, plain)]
            assert_close(*outs)
            cotangent = torch.randn_like(outs[0])
            grads = [
                torch.autograd.grad(out, leaves, torch._neg_view(-cotangent))
                for out, leaves in zip(outs, (lazy, plain), strict=True)
            ]
            assert_close(*grads)

    @float32
    def test_cow_input(self, device: str, dtype: torch.dtype, op: Any) -> None:
        """Inputs that share memory until somebody writes still share it afterwards."""
        for sample in _samples(op, device, dtype, False):
            lazy = [torch._lazy_clone(t).requires_grad_() for t in (sample.input, sample.args[0])]
            out = op(*lazy, *sample.args[1:], **sample.kwargs)
            cotangent = torch._lazy_clone(torch.ones_like(out))
            torch.autograd.grad(out, lazy, cotangent)
            assert all(torch._C._is_cow_tensor(tensor) for tensor in (*lazy, cotangent))

    @every_dtype
    def test_fake(self, device: str, dtype: torch.dtype, op: Any) -> None:
        """Without memory: the same shapes, dtypes and strides, of gradients too."""
        for sample in _samples(op, device, dtype, True):
            out = _call(op, sample)
            real = out, *_gradients(out, sample, torch.ones_like(out))
            with FakeTensorMode() as mode:
                fake = sample.transform(lambda t: mode.from_tensor(t) if _is_tensor(t) else t)
                out = _call(op, fake)
                got = out, *_gradients(out, fake, torch.ones_like(out))
            for a, b in zip(got, real, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class TestTracing(common_utils.TestCase):  # type: ignore[misc, name-defined]
    """What PyTorch's compilers ask of an op."""

    @float32
    def test_make_fx(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, False):
            arguments = (sample.input, *sample.args)
            for mode in ("real", "fake", "symbolic"):
                make_fx.make_fx_check(op, arguments, sample.kwargs, mode, self.assertEqual)

    @float32
    def test_aot_autograd(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, True):
            arguments = (sample.input, *sample.args)
            for dynamic in (False, True):
                aot_autograd.aot_autograd_check(
                    op, arguments, sample.kwargs, dynamic, assert_equals_fn=self.assertEqual
                )


class TestCompositeCompliance(common_utils.TestCase):  # type: ignore[misc, name-defined]
    """Subclasses of tensors pass through: nobody looks at memory behind their back."""

    @float32
    def test_operator(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, False):
            arguments = [sample.input, *sample.args]
            compliance.check_with_mode(op, arguments, sample.kwargs, self.assertEqual)
            compliance.check_all_permutations(op, arguments, sample.kwargs, self.assertEqual)

    @float32
    def test_backward(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, True):
            arguments = [sample.input, *sample.args]
            compliance.check_backward_formula(
                op, arguments, sample.kwargs, assert_equal_fn=self.assertEqual
            )

    @float32
    def test_forward_ad(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in _samples(op, device, dtype, True):
            arguments = [sample.input, *sample.args]
            compliance.check_forward_ad_formula(
                op, arguments, sample.kwargs, assert_equal_fn=self.assertEqual
            )


class TestGradients(common_utils.TestCase):  # type: ignore[misc, name-defined]
    """Finite differences, with all that an OpInfo can claim: batched, forward, second order."""

    def _inputs(self, device: str, op: Any) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        for sample in _samples(op, device, torch.float64, True):
            if sample.input.numel() > 0:  # there is nothing to differentiate
                rest, kwargs = sample.args[1:], sample.kwargs

                def function(x: Tensor, alpha: Tensor, rest: Any = rest, kw: Any = kwargs) -> Any:
                    return op(x, alpha, *rest, **kw)

                yield function, (sample.input, sample.args[0])

    @float64
    def test_fn_grad(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for function, inputs in self._inputs(device, op):
            assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)

    @float64
    def test_forward_mode_ad(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for function, inputs in self._inputs(device, op):
            assert torch.autograd.gradcheck(
                function, inputs, check_forward_ad=True, check_undefined_grad=True,
                check_batched_forward_grad=op.check_batched_forward_grad,
            )  # fmt: skip

    @float64
    def test_fn_gradgrad(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for function, inputs in self._inputs(device, op):
            assert torch.autograd.gradgradcheck(
                function, inputs, check_batched_grad=op.check_batched_gradgrad
            )

    @float64
    def test_fn_fwgrad_bwgrad(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for function, inputs in self._inputs(device, op):
            assert torch.autograd.gradgradcheck(
                function, inputs, check_fwd_over_rev=True, check_rev_over_rev=False,
                check_undefined_grad=False,
            )  # fmt: skip


for _template in (TestCommon, TestTracing, TestCompositeCompliance, TestGradients):
    device_type.instantiate_device_type_tests(_template, globals(), only_for="cpu")
del _template
