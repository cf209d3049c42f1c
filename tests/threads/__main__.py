"""The CPU kernels under ThreadSanitizer: `python -m tests.threads [--every-isa]`.

Builds driver.cpp with them and runs it; then plants faults into a copy of dispatch.cpp, each of
which has to be reported. The kernels are written once for all instruction sets, so that the
baseline alone is compiled: that takes a minute for each.
"""

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests import setup_script
from tests.checked.results import record

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "threads"
# After those of setup.py; -O1 keeps the build within a minute.
SANITIZER = ["-fsanitize=thread", "-O1", "-g1", "-fno-omit-frame-pointer"]
RACE = 66  # what ThreadSanitizer ends a program with


class Fault(NamedTuple):
    """A piece of text that stands once in dispatch.cpp, and what takes its place."""

    right: str
    wrong: str


_WORKSPACE = "const AlignedBuffer workspace(std::max<int64_t>(workspace_bytes, 1));"
_PARTS = "parallel_for(plan.groups * plan.strips, grain, [&](int64_t begin, int64_t end) {"
FAULTS = {
    "one workspace for all threads": Fault(
        f"{_PARTS}\n    {_WORKSPACE}", f"{_WORKSPACE}\n  {_PARTS}"
    ),
    "one share of the weights for all threads": Fault(
        "shares.data() : nullptr);",
        "shares.data() - begin * plan.share_rows * plan.num_pools : nullptr);",
    ),
    "instruction set chosen without a guard": Fault(
        "static const Isa* const chosen = choose_isa();",
        "static const Isa* chosen = nullptr;\n  if (chosen == nullptr) chosen = choose_isa();",
    ),
}


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of the kernels' sources with the fault; returns its dispatch.cpp."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc/cpu/dispatch.cpp"
    text = source.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(f"dispatch.cpp does not hold this once any more: {fault.right}")
    source.write_text(text.replace(fault.right, fault.wrong))
    return source


def build(*, every_isa: bool) -> tuple[dict[str, Path], list[str]]:
    """The programs, "right" and one for each fault, and the instruction sets that they have."""
    os.environ["METAPOOL_CXXFLAGS"] = shlex.join(SANITIZER)
    setup = setup_script.load()
    if not every_isa:
        setup.X86_ISAS = {}
    try:
        compiler, ninja = setup.find_compiler(), setup.find_ninja()
    except setup.CannotBuildError as problem:
        raise SystemExit(str(problem)) from None
    graph = setup.Graph(compiler)
    kernels, isas = setup.kernel_objects(graph)
    driver = graph.compile("tests/threads/driver.cpp")
    # What setup.py links is a library.
    command = f"{compiler} {shlex.join(SANITIZER)} $in -o $out $libraries"
    graph.lines += ["rule program", f"  command = {command}"]
    dispatch, *algorithms = kernels
    programs = {"right": FOLDER / "right"}
    graph.link([driver, dispatch, *algorithms], programs["right"], "-pthread", rule="program")
    defines = [f"-DMETAPOOL_HAS_{name.upper()}" for name in isas[1:]]
    for number, (name, fault) in enumerate(FAULTS.items()):
        source = plant(fault, FOLDER / f"fault{number}")
        wrong = graph.compile(source.relative_to(ROOT).as_posix(), *defines)
        programs[name] = source.parents[2] / "program"
        graph.link([driver, wrong, *algorithms], programs[name], "-pthread", rule="program")
    graph.run(ninja, FOLDER)
    return programs, isas


def run(program: Path, isa: str) -> tuple[int, str]:
    """Exit status and all that is printed; ends at the first race."""
    environment = os.environ | {"METAPOOL_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the CPU kernels under ThreadSanitizer.")
    parser.add_argument("--every-isa", action="store_true", help="not the baseline alone")
    programs, isas = build(every_isa=parser.parse_args().every_isa)
    for isa in isas:
        status, said = run(programs["right"], isa)
        print(said, end="", flush=True)
        if status != 0:
            raise SystemExit(f"the kernels failed, status {status}")
    for name in FAULTS:
        status, said = run(programs[name], isas[0])
        if status != RACE or "data race" not in said:
            raise SystemExit(f"not noticed, status {status}: {name}\n{said}")
        print(f"noticed: {name}")
    record("test-threads", f"no race; {len(FAULTS)} of {len(FAULTS)} planted faults noticed")


if __name__ == "__main__":
    main()
