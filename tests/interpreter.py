"""What the tests mend in Triton's interpreter: its rounding, and the time that it takes."""

from typing import Any

import torch


def mend() -> None:
    """Round as a GPU does, and patch the language once for each kernel that runs."""
    import triton.language as tl
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
