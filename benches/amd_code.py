"""The machine code of the Triton kernels for AMD's GPUs, which need not be there.

The assembler's text that Triton leaves has the instructions, and at its end what the kernel asks of
the processor.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

from benches.machine_code import name_of, source_of
from metapool_kernels._triton import launch

WAVE = 64
"""Lanes of a wave on the architectures called gfx9."""

_INSTRUCTION = re.compile(r"^\t([a-z]+_[a-z0-9_]+)", re.M)


@dataclass(frozen=True)
class AmdKernel:
    """A kernel for one architecture."""

    instructions: Counter[str]
    """How often each stands there."""
    registers: int
    """Of vectors, those for accumulators among them."""
    spilled: int
    """Registers of vectors that are kept in memory for a while."""
    scratch: int
    """Bytes of memory of each lane."""
    shared: int
    """Bytes of each program."""
    waves: int

    def count(self, *prefixes: str) -> int:
        """Instructions whose names begin with one of these."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


def compile_for_amd(
    call: Callable[[], object], *, backward: bool, architecture: str, kernel: str = ""
) -> AmdKernel:
    """Compile the kernel that a call would start.

    Args:
        call: calls :mod:`metapool_kernels._triton`, on tensors without memory.
        backward: which of the two kernels it starts.
        architecture: such as "gfx942".
        kernel: the name of another one that it starts.
    """
    target = GPUTarget("hip", architecture, WAVE)
    with patch.object(launch, "lanes_of_warp", lambda device: WAVE):
        source, options, _ = source_of(call, kernel or name_of(backward), target, {})
    compiled = triton.compile(source, target=target, options=options)
    return read(compiled.asm["amdgcn"], waves=options["num_warps"], shared=compiled.metadata.shared)


def read(text: str, *, waves: int, shared: int) -> AmdKernel:
    """What the assembler's text of a kernel says."""

    def asked(name: str) -> int:
        (value,) = re.findall(rf"^\s+-?\s*\.{name}:\s+(\d+)$", text, re.M)
        return int(value)

    if asked("wavefront_size") != WAVE:
        raise ValueError(f"compiled for waves of {asked('wavefront_size')} lanes, not {WAVE}")
    return AmdKernel(
        Counter(_INSTRUCTION.findall(text)),
        registers=asked("vgpr_count"),
        spilled=asked("vgpr_spill_count"),
        scratch=asked("private_segment_fixed_size"),
        shared=shared,
        waves=waves,
    )
