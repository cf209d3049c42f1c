"""What the tests mend in Triton's interpreter: its rounding, and the time that it takes.

Triton checks and converts the operands of each operation as if it compiled. With maps of a few
pixels that takes all the time there is, most of it to make the same types again and again: they are
kept here. What is computed, and what is refused, stays the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Round as a GPU does; do once what needs to be done once."""
    _round_bfloat16()
    _patch_the_language_once()
    _keep_types()
    _leave_operands_that_fit()


def _round_bfloat16() -> None:
    """Leave bfloat16 to torch: the interpreter cuts bits off, and loses denormal numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            widened = torch.from_numpy(src.data.copy()).view(torch.bfloat16).float()
            return interpreter.TensorHandle(widened.numpy(), tl.float32)
        return convert(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast


def _patch_the_language_once() -> None:
    """Device functions that a kernel calls find the language patched."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def modules_of(fn: Any) -> list[Any]:
        return [m for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())]

    def patch_once(fn: Any) -> Any:
        patched = not any(tl.core.is_builtin(module.load) for module in modules_of(fn))
        return interpreter._LangPatchScope() if patched else patch(fn)

    interpreter._patch_lang = patch_once


def _keep_types() -> None:
    """Shapes are checked once each, and the table of NumPy's types is not built for each array."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    scalars: dict[str, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self) | {"tensors": {}}
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        same = type.tensors if type.is_block() else scalars
        if not same:
            make_tensor(self, handle, type)
            same.update(shape=self.shape, numel=self.numel)
        vars(self).update(same, handle=handle, type=type, dtype=type.scalar)

    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor
    table = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(of: Any) -> Any:
        return np.dtype(np.uint64) if of.scalar.is_ptr() else table(of.scalar)

    interpreter._get_np_dtype = numpy_dtype


def _leave_operands_that_fit() -> None:
    """Two blocks of one shape are not broadcast, a type is not cast to itself, and integers are
    checked for overflow in NumPy and not by ten more operations of the language."""
    from triton.language.semantic import TritonSemantic

    broadcast, cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast

    def broadcast_if_needed(self: Any, left: Any, right: Any) -> Any:
        both = left.type.is_block() and right.type.is_block()
        fit = both and left.type.shape is right.type.shape
        return (left, right) if fit else broadcast(self, left, right)

    def cast_if_needed(self: Any, value: Any, dtype: Any, *rest: Any, **options: Any) -> Any:
        same = value.dtype is dtype and not rest and not options
        return value if same else cast(self, value, dtype, *rest, **options)

    TritonSemantic.broadcast_impl_value = broadcast_if_needed
    TritonSemantic.cast = cast_if_needed
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def _refuse_overflow(_: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
    if left.type.scalar.int_bitwidth >= 64:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = exact(*(side.handle.data.astype(np.int64) for side in (left, right)))
    kind = left.type.scalar
    fits = (kind.get_int_min_value() <= result) & (result <= kind.get_int_max_value())
    assert fits.all(), f"{kind} overflow detected for operation {operation.__name__}"
