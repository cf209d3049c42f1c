"""What the tests mend in Triton's interpreter: its rounding, and the time that it takes."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Round as a GPU does, and patch the language once for each kernel that runs."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    convert = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        """Leave bfloat16 to torch: the interpreter cuts bits off, and loses denormal numbers."""
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            widened = torch.from_numpy(src.data.copy()).view(torch.bfloat16).float()
            return interpreter.TensorHandle(widened.numpy(), tl.float32)
        return convert(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast
    patch = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        """Device functions that a kernel calls find the language patched: half the time."""
        modules = [m for m in (tl, tl.core) if m in fn.__globals__.values()]
        patched = not any(tl.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if patched else patch(fn)

    interpreter._patch_lang = patch_once
    # A table of all types is built for each array that is made.
    table = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(of: Any) -> Any:
        return np.dtype(np.uint64) if of.scalar.is_ptr() else table(of.scalar)

    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def _refuse_overflow(_: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
    """Check integers in NumPy; the interpreter does it with ten more operations of the language."""
    if left.type.scalar.int_bitwidth >= 64:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = exact(*(side.handle.data.astype(np.int64) for side in (left, right)))
    kind = left.type.scalar
    fits = (kind.get_int_min_value() <= result) & (result <= kind.get_int_max_value())
    assert fits.all(), f"{kind} overflow detected for operation {operation.__name__}"
