"""Instructions for each element on AArch64: `python -m benches.arm_instructions [--before TREE]`.

One map, 8 x 32 x 28 x 28. `squares` are the default candidates, which the streamed kernels take;
`strips` (1x7 and 7x1) need those that can do everything. Counts are exact and the same everywhere,
but say nothing of how many instructions a chip begins at once, nor of its memory. TREE is another
checkout, whose csrc is counted too.

Needs g++-aarch64-linux-gnu and qemu-user; that of qemu-user-static takes no plugins.
"""

import argparse
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests import setup_script
from tests.arm.build import COMPILER, Programs

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EMULATOR = "qemu-aarch64"


def build_counter(folder: Path) -> Path:
    """The emulator's plugin."""
    plugin = folder / "counter.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, HERE / "counter.cpp", "-o", plugin], check=True)
    return plugin


def build_calls(tree: Path, folder: Path) -> Path:
    """The program with the kernels of a tree."""
    script = setup_script.load()
    script.X86_ISAS = {}
    programs = Programs(script, COMPILER, tree, ())
    objects, _ = script.kernel_objects(programs.graph)
    script.ROOT = ROOT
    program = folder / "calls"
    programs.add(program, "benches/arm_instructions/calls.cpp", objects)
    programs.build(folder)
    return program


def count(plugin: Path, program: Path, words: tuple[str, ...]) -> float:
    """Instructions for each element of a call."""
    executed = []
    for calls in ("1", "2"):
        command = [EMULATOR, "-plugin", plugin, program, *words, calls]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        executed.append(int(done.stderr))
    return (executed[1] - executed[0]) / int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count instructions on AArch64.")
    parser.add_argument("--before", type=Path, help="another tree to compare with")
    before = parser.parse_args().before
    for needed in (COMPILER, EMULATOR, "g++"):
        if shutil.which(needed) is None:
            raise SystemExit(f"{needed} was not found")
    directions = ("forward", "backward")
    cases = itertools.product(
        ("squares", "strips"), ("float32", "bfloat16", "float16"), ("contiguous", "channels_last")
    )
    with tempfile.TemporaryDirectory() as temporary:
        plugin = build_counter(Path(temporary))
        programs = []
        for number, tree in enumerate([before.resolve(), ROOT] if before else [ROOT]):
            folder = Path(temporary) / str(number)
            programs.append(build_calls(tree, folder))
        print(f"| | {' | '.join(directions)} |\n|---|---|---|", flush=True)
        for case in cases:
            cells = []
            for direction in directions:
                counts = [count(plugin, program, (*case, direction)) for program in programs]
                cells.append(" to ".join(f"{number:.1f}" for number in counts))
            print(f"| {', '.join(case)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
