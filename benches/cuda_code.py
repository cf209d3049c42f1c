"""The machine code of the CUDA kernels: what nvcc makes of csrc/cuda, and how calls are cut.

:func:`kernels` compiles what has changed into build/cuda_code and reads it; :func:`launch_of` finds
the streamed kernel of a call, and how many threads run it.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benches.machine_code import Code, read, run
from tests import setup_script

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "cuda_code"
SOURCES = ("backward", "forward")  # the slow one first
_SETUP = setup_script.load()
FLAGS: list[str] = _SETUP.CUDA_FLAGS


@dataclass(frozen=True)
class Processor:
    """What blocks share: bytes of shared memory, threads and blocks at once."""

    shared: int
    threads: int = 2048
    blocks: int = 32
    reserved: int = 1024
    """Bytes of shared memory that CUDA keeps of each block for itself."""
    registers: int = 65536


PROCESSORS = {
    75: Processor(64 * 1024, threads=1024, blocks=16, reserved=0),
    80: Processor(164 * 1024),
    90: Processor(228 * 1024),
    100: Processor(228 * 1024),
}
"""By compute capability."""

_TYPES = {
    "float": "float32",
    "double": "float64",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
}
_KINDS = {("true", "true"): "avg+max", ("true", "false"): "avg", ("false", "true"): "max"}
_ACCESS = ("vectors", "dense", "strided")
_FORMS = {
    "Outcome": ("", " side by side", " of moments", " of products"),
    "Form": ("", " side by side", " of fields"),
}
_WORDS = {
    "streamed_fwd": "forward",
    "streamed_bwd": "backward",
    "general_fwd": "general forward",
    "windows": "general averages",
    "general_grad_x": "general gradient of x",
    "general_terms": "general gradient of weights",
    "general_moments": "general forward",
    "moments": "total",
}

# Constants of the kernels, and the cut of a call, by the very functions that launch it.
_FACTS = r"""
#include <cstdio>
#include <cstdlib>
#include "streamed_backward.cuh"
#include "streamed_forward.cuh"

using namespace metapool;
using namespace metapool::cuda;

template <Form kForm, int kColumns>
void print_backward(const char* name) {
  std::printf("%s,avg%d %d\n", name, kColumns,
              BackwardShared<kForm, true, false, kColumns>::kBytes);
  std::printf("%s,max%d %d\n", name, kColumns,
              BackwardShared<kForm, false, true, kColumns>::kBytes);
  std::printf("%s,avg+max%d %d\n", name, kColumns,
              BackwardShared<kForm, true, true, kColumns>::kBytes);
}

int main(int count, char** words) {
  if (count == 1) {
    print_backward<Form::kMix, 2>("backward");
    print_backward<Form::kMix, 4>("backward");
    print_backward<Form::kStack, 2>("backward_side_by_side");
    print_backward<Form::kMoments, 2>("backward_of_fields");
    std::printf("most_strip_rows %d\n", static_cast<int>(kMostStripRows));
    std::printf("overlap2 %d\noverlap4 %d\n", overlap_of(2), overlap_of(4));
    std::printf("forward_of_moments %d\n", kForwardShared<Outcome::kMoments>);
    std::printf("forward_of_products %d\n", kForwardShared<Outcome::kProducts>);
    std::printf("reach %d\nsum_rows %d\n", kReach, kSumRows);
    return 0;
  }
  int64_t given[8];
  for (int i = 0; i < 8; ++i) given[i] = std::atoll(words[i + 1]);
  const int64_t c = given[1], h = given[2], w = given[3];
  const bool last = given[4] != 0;
  const Sizes sizes{given[0], c, h, w, h, w, 1, 1, true};
  const Map<float> map{nullptr, c * h * w, last ? 1 : h * w, last ? c * w : w, last ? c : 1};
  const Cut cut = cut_of(sizes, given[5], given[6], given[7], is_channels_last(map));
  std::printf("access %d\n", static_cast<int>(access_of(map, w, given[6])));
  std::printf("blocks %lld\n", static_cast<long long>(cut.blocks));
  std::printf("strip_rows %lld\n", static_cast<long long>(cut.strip_rows));
}
"""


@dataclass(frozen=True)
class CudaKernel:
    """A kernel for one architecture, and how it is launched."""

    name: str
    """Such as "backward, avg+max, float32, vectors"."""
    code: Code
    capability: int
    threads: int
    """Of a block."""
    shared: int
    """Bytes of a block, with those that CUDA keeps for itself."""
    columns: int
    """Of a lane, of a streamed kernel."""

    @property
    def is_streamed(self) -> bool:
        """Whether it streams down the map, one row after the other."""
        return self.name.startswith(("forward", "backward"))

    @property
    def blocks(self) -> int:
        """How many of its blocks a processor holds at once."""
        of = PROCESSORS[self.capability]
        registers = -(-self.code.registers // 8) * 8 * self.threads
        by_shared = of.shared // max(self.shared, 1)
        return min(of.registers // registers, by_shared, of.threads // self.threads, of.blocks)

    def load_distances(self) -> list[int]:
        """How many instructions each load in the loop over rows stands before what waits for it."""
        loop = max(self.code.loops, key=len)
        names = self.code.instructions[loop.start : loop.stop] * 2
        operands = self.code.operands[loop.start : loop.stop] * 2
        found = []
        for i, name in enumerate(names[: len(loop)]):
            if name.startswith("LDG"):
                first = int(re.findall(r"\bR(\d+)", operands[i])[0])
                width = 4 if ".128" in name else 2 if ".64" in name else 1
                loaded = {f"R{first + k}" for k in range(width)}
                found.append(_first_use(loaded, names[i + 1 :], operands[i + 1 :]))
        return found

    def executed(self, trips: Sequence[float], on_map: float) -> Counter[str]:
        """What a thread of a streamed kernel runs, by kind.

        Other loops count once, and so does what stands around them, both sides of every branch, but
        for subroutines and for the second run of backward, which stands behind a vote.

        Args:
            trips: how often the loops over rows run, which are the first.
            on_map: the part of the rows there for which what a branch can skip is not skipped.
        """
        full_names = self.code.instructions
        names = [name.split(".")[0] for name in full_names]
        votes = [i for i, name in enumerate(full_names) if name.startswith("BAR.RED")]
        end = votes[0] if votes else len(names) - 1 - names[::-1].index("EXIT")
        times = [1.0] * (end + 1)
        for loop, count in zip(self.code.loops, trips, strict=False):
            skipped = [skip for skip in self.code.skips if skip.stop in loop]
            for i in loop:
                times[i] = count * (on_map if any(i in skip for skip in skipped) else 1)
        counts: Counter[str] = Counter()
        for name, count in zip(names, times, strict=False):
            counts[name] += count  # type: ignore[assignment]
        return counts


def _first_use(registers: set[str], names: Sequence[str], operands: Sequence[str]) -> int:
    """How many instructions stand before the first that reads one of the registers."""
    for i, (name, text) in enumerate(zip(names, operands, strict=True)):
        mentioned = re.findall(r"\bR\d+", text)
        written = [] if name.startswith("ST") or not re.match(r"\s*R\d", text) else mentioned[:1]
        if registers & set(mentioned[len(written) :]):
            return i
        registers = registers - set(written)
    return len(names)


@dataclass(frozen=True)
class Launch:
    """A streamed kernel, and how it cuts the maps of a call."""

    kernel: CudaKernel
    blocks: int
    height: int
    strip_rows: int

    @property
    def threads(self) -> int:
        """All of them, those that have nothing to do among them."""
        return self.blocks * self.kernel.threads

    @property
    def executed(self) -> Counter[str]:
        """What a thread runs, by kind, on average over the strips of a plane."""
        begins = range(0, self.height, self.strip_rows)
        parts = [self._executed(begin) for begin in begins]
        total: Counter[str] = sum(parts, Counter())
        return Counter({name: count / len(parts) for name, count in total.items()})  # type: ignore

    def _executed(self, begin: int) -> Counter[str]:
        reach, end = facts()["reach"], min(begin + self.strip_rows, self.height)
        if not self.kernel.name.startswith("backward"):
            # Rounds of as many rows as a window has, and the rest.
            rows = min(end + reach, self.height) - max(begin - reach, 0)
            return self.kernel.executed(divmod(rows, 2 * reach + 1), on_map=1)
        # It sees windows and what these hold, and gives a row back one row later.
        first, last = max(begin - 2 * reach, 0), end + 2 * reach + 1
        step = facts()["sum_rows"]
        rounds = -(-(last - first) // step)
        rows = min(last, self.height) - first
        return self.kernel.executed([rounds], on_map=rows / (step * rounds))


@cache
def find_nvcc() -> str | None:
    """Path of CUDA's compiler, or None."""
    try:
        return str(_SETUP.find_nvcc())
    except _SETUP.CannotBuildError:
        return None


def nvcc_version() -> str:
    """Such as "13.0"."""
    text = subprocess.run(
        [find_nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "of an unknown version"


def _changed(source: Path) -> float:
    """When the compiler, or anything that may be in what it makes of a source, last changed."""
    parts = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc/cuda").iterdir(), source]
    parts += [setup_script.PATH, Path(find_nvcc() or source)]  # FLAGS
    return max(path.stat().st_mtime for path in parts)


def _nvcc(source: Path, target: Path, *flags: str) -> Path:
    """Compile, unless the target is newer than the compiler and all that may be in it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found on PATH or in /usr/local/cuda/bin")
    if not target.exists() or target.stat().st_mtime <= _changed(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"partial-{os.getpid()}-{target.name}")
        command = [nvcc, *FLAGS, *flags, f"-I{ROOT / 'csrc/cuda'}", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        partial.rename(target)
    return target


def _cubin(name: str, capability: int) -> Path:
    """Out of what setup.py has compiled, where it is up to date, or compiled here."""
    source = ROOT / f"csrc/cuda/{name}.cu"
    target = FOLDER / f"{name}.sm_{capability}.cubin"
    for built in (ROOT / "build").glob(f"native-*/csrc_cuda_{name}.cu.o"):
        if built.stat().st_mtime > _changed(source) and _extract(built, capability, target):
            return target
    return _nvcc(source, target, "-cubin", f"-arch=sm_{capability}")


def _extract(built: Path, capability: int, target: Path) -> bool:
    """Take the code for an architecture out of an object file; False if it has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        run("cuobjdump", "-xelf", built, f"sm_{capability}", folder=Path(folder))
        found = list(Path(folder).glob(f"*.sm_{capability}.cubin"))
        if len(found) == 1:
            found[0].replace(target)
    return len(found) == 1


@cache
def _facts_program() -> Path:
    source = FOLDER / "facts.cu"
    if not source.exists() or source.read_text() != _FACTS:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(_FACTS)
    return _nvcc(source, FOLDER / "facts", "-arch=sm_90")


@cache
def facts(*numbers: int) -> dict[str, int]:
    """Constants of the kernels, or the cut of a call on maps without gaps.

    Args:
        numbers: n, c, h and w of a map, whether it is channels_last, the threads of a block, the
            columns of a lane, and the lanes that two tiles share.
    """
    command = [str(_facts_program()), *map(str, map(int, numbers))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: int(number) for name, number in map(str.split, lines)}


def _kernel(demangled: str, code: Code, threads: int, capability: int) -> CudaKernel:
    match = re.search(r"(\w+)_kernel<(.*?)>\(metapool", demangled)
    assert match, f"{demangled} has a name that nobody here knows"
    arguments = match[2].split(", ")
    words = [_WORDS.get(match[1], match[1].replace("_", " "))]
    if form := re.search(r"::(Outcome|Form)\)(\d)", arguments[-1]):
        words[0] += _FORMS[form[1]][int(form[2])]
    if match[1] == "windows" and arguments[1] == "unsigned char":
        words[0] = "general places of maxima"
    # What puts parts of planes together knows float64 alone.
    dynamic, columns, type_name = 0, 0, _TYPES.get(arguments[0], "float64")
    if match[1] in ("general_terms", "general_moments", "total"):
        dynamic = threads * 8
    if match[1].startswith("streamed"):
        columns = int(arguments[3])
        place, kinds = words[0].replace(" ", "_"), _KINDS[arguments[1], arguments[2]]
        if match[1] == "streamed_bwd":
            dynamic = facts()[f"{place},{kinds}{columns}"]
        elif place in ("forward_of_moments", "forward_of_products"):
            dynamic = facts()[place]
        if match[1] == "streamed_bwd" and columns == 2 and words[0] == "backward":
            words[0] += "" if type_name == "float32" else " by two columns"
        words += [kinds, type_name, _ACCESS[int(arguments[4][-1])]]
    else:
        words += [type_name]
    reserved = PROCESSORS[capability].reserved
    assert code.shared in (0, reserved), f"{demangled} has static shared memory"
    return CudaKernel(", ".join(words), code, capability, threads, reserved + dynamic, columns)


def _demangled(names: Iterable[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    assert tool, "neither cu++filt nor c++filt was found"
    command = [tool, *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _threads(cubin: Path) -> dict[str, int]:
    """The most threads of a block that each kernel of a file takes, which is what it gets."""
    parts = re.split(r"^\.nv\.info\.(\S+)$", run("cuobjdump", "-elf", cubin), flags=re.M)[1:]
    found = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x\w+)", text):
            found[name] = int(match[1], 16)
    return found


def _read(source: str, capability: int) -> list[CudaKernel]:
    cubin = _cubin(source, capability)
    codes, threads = read(cubin), _threads(cubin)
    return [
        _kernel(name, code, threads[mangled], capability)
        for name, (mangled, code) in zip(_demangled(codes), codes.items(), strict=True)
    ]


def compile_all(capabilities: Iterable[int]) -> None:
    """Compile all that has changed, for several architectures."""
    calls = [(source, capability) for source in SOURCES for capability in capabilities]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_cubin, *zip(*calls, strict=True)))
        _facts_program()


@cache
def kernels(capability: int) -> dict[str, CudaKernel]:
    """All kernels for an architecture, by name."""
    compile_all([capability])
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        parts = pool.map(_read, SOURCES, [capability] * len(SOURCES))
        found = [kernel for part in parts for kernel in part]
    by_name = {kernel.name: kernel for kernel in found}
    assert len(by_name) == len(found), "two kernels have the same name"
    return by_name


def launch_of(
    name: str, size: tuple[int, int, int, int], *, channels_last: bool, capability: int
) -> Launch:
    """The launch of a streamed kernel on maps without gaps.

    Args:
        name: such as "backward, avg+max, float32".
        size: n, c, h and w of the maps.
        channels_last: how all maps lie in memory.
        capability: such as 90, for sm_90.
    """
    found = kernels(capability)
    some = found[f"{name}, {_ACCESS[0]}"]
    overlap = facts()[f"overlap{some.columns}"] if name.startswith("backward") else 0
    cut = facts(*size, channels_last, some.threads, some.columns, overlap)
    kernel = found[f"{name}, {_ACCESS[cut['access']]}"]
    return Launch(kernel, cut["blocks"], size[2], cut["strip_rows"])
