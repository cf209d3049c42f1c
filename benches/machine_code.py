"""The machine code of kernels for GPUs that need not be there.

:func:`compile_call` compiles what a call of the Triton kernels would run, down to the
specialisation on its strides; :class:`Kernel` reads registers, memory and instructions off the
result. :func:`read` does so for a file of any kernels.
"""

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from metapool_kernels._triton import launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", re.M)
_LABEL = re.compile(r"^(\.L_x_\d+):", re.M)
_BEGIN = re.compile(r"^\.text\.(\S+):$", re.M)
_USAGE = re.compile(r" Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel in order, and what it needs."""

    instructions: tuple[str, ...]
    operands: tuple[str, ...]
    """Of each instruction, what it writes first."""
    loops: tuple[range, ...]
    """The instructions of each loop."""
    skips: tuple[range, ...]
    """What each branch forward can pass over."""
    registers: int
    stack: int
    shared: int

    def count(self, *names: str) -> int:
        """Instructions of these kinds, such as ``"LDG"``, wherever they stand."""
        return sum(name.split(".")[0] in names for name in self.instructions)


@dataclass(frozen=True)
class Kernel(Code):
    """A Triton kernel; its loops run over rows."""

    programs: int
    arguments: dict[str, Any]

    def executed(self, rows: int) -> Counter[str]:
        """What a program runs, by kind, to produce ``rows`` rows of its lanes.

        Of a backward kernel that does not rerun. Branches count as taken both ways, so that this is
        an upper bound where there are any.
        """
        counts = Counter(name.split(".")[0] for name in self.instructions)
        unroll = self.arguments["UNROLL"]
        trips = [-(-rows // unroll)]
        if "RERUNS" in self.arguments:
            # Before any window is complete, before that is one of the first row, while there is
            # input for all of them, and at the end.
            above = self.arguments["RADIUS_H"]
            rounds = max(rows - 2 * above, 0) // unroll
            trips = [above, above, rounds, rows - rounds * unroll]
        if self.arguments["HEIGHT"]:
            trips = []
        # The compiler unrolls the first ones where it knows how often they run.
        for loop, times in zip(self.loops, trips[len(trips) - len(self.loops) :], strict=True):
            for name in self.instructions[loop.start : loop.stop]:
                counts[name.split(".")[0]] += times - 1
        return counts

    @property
    def lanes(self) -> int:
        """Lanes of all programs, those that have nothing to do among them."""
        warps: int = self.arguments.get("SEGMENTS") or self.arguments["BLOCK"] // 32
        return self.programs * warps * 32


class _Recorder:
    """Stands in for a kernel and keeps what it is called with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((grid[0], args, kwargs))


@contextmanager
def _recorded(name: str) -> Iterator[_Recorder]:
    kernel = getattr(launch, name)
    recorder = _Recorder(kernel)
    setattr(launch, name, recorder)
    try:
        yield recorder
    finally:
        setattr(launch, name, kernel)


def compile_call(
    call: Callable[[], object],
    *,
    backward: bool,
    capability: int,
    kernel: str = "",
    **constants: object,
) -> Kernel:
    """Compile the kernel that a call would start.

    Args:
        call: calls :mod:`metapool_kernels._triton`, on tensors without memory.
        backward: which of the two kernels it starts.
        capability: 80, 90 or 100, as in sm_90.
        kernel: the name of another one that it starts.
        constants: of the kernel, to be compiled for instead of those of the call.
    """
    target = GPUTarget("cuda", capability, 32)
    source, options, programs = source_of(call, kernel or name_of(backward), target, constants)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = read(Path(file.name)).values()
    return Kernel(
        code.instructions,
        operands=code.operands,
        loops=code.loops,
        skips=code.skips,
        registers=code.registers,
        stack=code.stack,
        shared=compiled.metadata.shared,
        programs=programs,
        arguments={
            source.fn.arg_names[path[0]]: value
            for path, value in source.constants.items()
            if len(path) == 1
        },
    )


def lower_call(call: Callable[[], object], *, backward: bool) -> str:
    """Run the front end alone, which knows what the interpreter does not: types.

    Returns:
        The intermediate representation.
    """
    target = GPUTarget("cuda", 90, 32)
    source, options, _ = source_of(call, name_of(backward), target, {})
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(parsed)
    return str(source.make_ir(target, parsed, code, backend.get_module_map(), context))


def name_of(backward: bool) -> str:
    """The kernel of that direction."""
    return "meta_pool_bwd_kernel" if backward else "meta_pool_fwd_kernel"


def source_of(
    call: Callable[[], object], name: str, target: GPUTarget, constants: dict[str, object]
) -> tuple[ASTSource, dict[str, Any], int]:
    """What a call would compile, with which options, and how many programs it would start."""
    with _recorded(name) as recorder:
        call()
    ((programs, args, kwargs),) = recorder.calls
    kwargs |= constants
    options = {name: kwargs.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, constexprs, attributes = _specialised(recorder.kernel, target, args, kwargs)
    return ASTSource(recorder.kernel, signature, constexprs, attributes), options, programs


def _specialised(
    kernel: Any, target: GPUTarget, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """What the launcher makes of arguments: their types, constants among them, and what divides."""
    backend = make_backend(target)
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def of(value: Any, path: tuple[int, ...], specialises: bool) -> Any:
        if isinstance(value, Tensor):
            known = backend.get_tensor_specialization(value, align=True)
            if found := backend.parse_attr(known):
                attributes[path] = found
            return f"*{_TYPES[value.dtype]}"
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, tuple):
            items = (of(item, (*path, i), specialises) for i, item in enumerate(value))
            return type(value)(*items)
        if specialises and value == 1:
            constants[path] = 1
            return "constexpr"
        if specialises and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for i, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
        signature[param.name] = of(value, (i,), not param.do_not_specialize)
    for name, value in kwargs.items():
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = value
    return signature, constants, attributes


def read(cubin: Path) -> dict[str, Code]:
    """All kernels of a file, by their names as the linker sees them; static shared memory alone."""
    found = _BEGIN.split(run("nvdisasm", "-c", cubin))[1:]
    texts = dict(zip(found[::2], found[1::2], strict=True))
    usage = _USAGE.findall(run("cuobjdump", "-res-usage", cubin))
    return {
        name: Code(
            *_disassemble(texts[name]),
            registers=int(registers),
            stack=int(stack) + int(local),
            shared=int(shared),
        )
        for name, registers, stack, shared, local in usage
    }


def run(tool: str, option: str, file: Path, *values: str, folder: Path | None = None) -> str:
    """What one of CUDA's tools, which come with Triton, says about a file.

    Args:
        tool: its name.
        option: what it is asked for.
        file: of machine code.
        values: of the option.
        folder: where it leaves files.
    """
    command = [str(_TOOLS / tool), option, *values, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def _disassemble(
    text: str,
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[range, ...], tuple[range, ...]]:
    """All instructions of a kernel, their operands, and where branches lead back and forward."""
    found = list(_INSTRUCTION.finditer(text))
    begins = [match.start() for match in found]
    labels = {match[1]: bisect_left(begins, match.start()) for match in _LABEL.finditer(text)}
    loops, skips = [], []
    for i, match in enumerate(found):
        target = re.search(r"\.L_x_\d+", match[2]) if match[1].startswith("BRA") else None
        # The jump to itself after the end of a program is none.
        if target and labels[target[0]] < i:
            loops.append(range(labels[target[0]], i + 1))
        elif target:
            skips.append(range(i + 1, labels[target[0]]))
    names, operands = zip(*(match.groups() for match in found), strict=True)
    return names, operands, tuple(loops), tuple(skips)
