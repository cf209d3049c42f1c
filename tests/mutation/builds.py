"""The native libraries of a copy of the tree, built in the least time.

For the CPU that is one instruction set of three and no NumPy module, hardly optimised: a quarter of
the time of a whole build, and every line of the algorithms is in it. For CUDA it is float32 and
bfloat16 alone.
What is for AArch64 is compared with what setup.py has built.
"""

import json
import subprocess
from pathlib import Path

from tests import setup_script
from tests.arm import build as arm
from tests.cuda_host import build as cuda_host

FAST = ["-Og", "-g0", "-w"]


class DoesNotBuildError(Exception):
    """What the compiler said."""


def build_cpu(root: Path) -> Path:
    """The torch ops of the sources under ``root``, where the package there looks for them."""
    script = setup_script.load()
    script.ROOT, script.X86_ISAS = root, {}
    graph = script.Graph(script.find_compiler())
    graph.extra += FAST
    objects, names = script.kernel_objects(graph)
    needs = script.torch_needs()
    objects = [graph.compile("python_bindings/torch_ops.cpp", *needs.compile_flags), *objects]
    library = root / "metapool_kernels" / script.LIBRARIES["torch_ops"]
    graph.link(objects, library, *needs.link_flags)
    folder = root / "build" / "cpu"
    graph.write(folder)
    # Jobs run beside each other as it is.
    command = [script.find_ninja(), "-C", str(folder), "-j1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DoesNotBuildError(done.stdout)
    facts = {part: {"skipped": "faults are tried without"} for part in script.LIBRARIES}
    facts["torch_ops"] = {"compiler": "any", "instruction_sets": names, **needs.about}
    (root / "metapool_kernels/_build.json").write_text(json.dumps(facts))
    return library


def build_cuda(root: Path) -> Path:
    """The CUDA kernels under ``root`` for the CPU."""
    try:
        return cuda_host.build(root, root / "build" / "cuda", flags=["-O0", "-g0", "-w"])
    except RuntimeError as problem:
        raise DoesNotBuildError(str(problem)) from None


def build_arm(root: Path) -> Path:
    """The CPU kernels under ``root`` for AArch64, beside those of this machine without a fault."""
    try:
        return arm.build(root, root / "build" / "arm", FAST)
    except RuntimeError as problem:
        raise DoesNotBuildError(str(problem)) from None


def keep_two_types(root: Path) -> None:
    """Have the CUDA kernels under ``root`` compiled for float32 and bfloat16 alone."""
    path = root / "csrc/cuda/device.cuh"
    text = path.read_text()
    for other in ("double", "__half"):
        call = f"return body({other}{{}});"
        assert text.count(call) == 1, f"{path} has {call!r} {text.count(call)} times"
        text = text.replace(call, "return body(float{});")
    path.write_text(text)


BUILDS = {"cpu": build_cpu, "cuda": build_cuda, "arm": build_arm}
"""What an area can ask for; each returns the library's path."""
