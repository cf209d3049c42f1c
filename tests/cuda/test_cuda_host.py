"""What the harness that runs CUDA kernels on the CPU finds, and that it lets right kernels through.

Tests of the kernels themselves are no better than what it notices.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_host import build

KERNELS = r"""
#include <cstdio>
#include <stdexcept>
#include <string>

namespace metapool::cuda {

template <bool synchronised>
__global__ void __launch_bounds__(256) sum(const float* __restrict__ in, float* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* parts = reinterpret_cast<float*>(shared_memory);
  const unsigned thread = threadIdx.x;
  parts[thread] = __ldg(in + blockIdx.x * blockDim.x + thread);
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (synchronised) __syncthreads();
    if (thread < half) parts[thread] += parts[thread + half];
  }
  if (thread == 0) out[blockIdx.x] = parts[0];
}

__global__ void some_return() {
  if (threadIdx.x > 4) return;
  __syncthreads();
}

__global__ void two_places() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void write_some(float* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  if (blockIdx.x == 0 || threadIdx.x < 2) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void write_at(int place) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  shared_memory[place] = 1;
}

__global__ void vote(const int* votes, int* out) {
  __shared__ int rounds[1];
  if (threadIdx.x == 0) rounds[0] = 0;
  __syncthreads();
  while (__syncthreads_or(votes[threadIdx.x] > rounds[0])) {
    if (threadIdx.x == 0) ++rounds[0];
    __syncthreads();
  }
  out[threadIdx.x] = rounds[0];
}

__global__ void note_order(unsigned* order, unsigned* count) {
  order[(*count)++] = threadIdx.x;
  __syncthreads();
  order[(*count)++] = threadIdx.x;
}

__global__ void change_argument(int value, int* out) { out[threadIdx.x] = value++; }

__global__ void refuse() { throw std::invalid_argument("refused"); }

struct Map {
  float4 first;
  const float* data;
};
__global__ void read_struct(Map map, float* out) { *out = map.first.w + map.data[1]; }

void report(const char* what) {
  std::printf("%s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
}

void sums(bool synchronised) {
  static float in[512], out[2];
  for (int i = 0; i < 512; ++i) in[i] = i;
  const auto kernel = synchronised ? sum<true> : sum<false>;
  METAPOOL_LAUNCH(kernel, 2, 256, 256 * sizeof(float), nullptr, in, out);
  std::printf("%g %g\n", out[0], out[1]);
}

void unwritten() {
  float out[4];
  METAPOOL_LAUNCH(write_some, 2, 4, 4 * sizeof(float), nullptr, out);
  std::printf("%g %g %d %d\n", out[0], out[1], isnan(out[2]), isnan(out[3]));
}

void votes() {
  const int in[4] = {0, 3, 1, 2};
  int out[4];
  METAPOOL_LAUNCH(vote, 3, 4, 0, nullptr, in, out);
  std::printf("%d %d %d %d\n", out[0], out[1], out[2], out[3]);
}

void order() {
  unsigned order[16], count = 0;
  METAPOOL_LAUNCH(note_order, 1, 8, 0, nullptr, order, &count);
  for (unsigned thread : order) std::printf("%u ", thread);
}

void arguments() {
  int out[2];
  METAPOOL_LAUNCH(change_argument, 1, 2, 0, nullptr, 5, out);
  const float data[2] = {1, 2};
  float sum;
  METAPOOL_LAUNCH(read_struct, 1, 1, 0, nullptr, Map{make_float4(0, 0, 0, 40), data}, &sum);
  std::printf("%d %d %g\n", out[0], out[1], sum);
}

void after_failures() {
  for (int i = 0; i < 3; ++i) {
    try {
      METAPOOL_LAUNCH(some_return, 1, 1024, 0, nullptr);
    } catch (const std::runtime_error&) {
      sums(true);
    }
  }
}

void launches() {
  const auto launch = [](const char* what, int64_t grid, int64_t block, int64_t shared) {
    METAPOOL_LAUNCH(write_at, grid, block, shared, nullptr, 0);
    report(what);
  };
  launch("fine", 1, 1024, 48 << 10);
  launch("empty grid", 0, 32, 16);
  launch("long grid", int64_t{1} << 31, 32, 16);
  launch("empty block", 1, 0, 16);
  launch("large block", 1, 1025, 16);
  launch("unasked", 1, 1, (48 << 10) + 1);
  launch("fine again", 1, 1, 16);
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  cudaFuncSetAttribute(write_at, most, 100 << 10);
  launch("asked", 1, 1, 100 << 10);
  launch("more than asked", 1, 1, (100 << 10) + 1);
  cudaFuncSetAttribute(write_at, most, (227 << 10) + 1);
  report("asked for too much");
  cudaFuncSetAttribute(write_at, most, 227 << 10);
  launch("most", 1, 1, 227 << 10);
  static_assert(alignof(float4) == 16 && alignof(double2) == 16 && alignof(uint2) == 8);
}

template <typename From, typename To>
void convert(To (*function)(From)) {
  for (From from; std::fread(&from, sizeof from, 1, stdin) == 1;) {
    const To to = function(from);
    std::fwrite(&to, sizeof to, 1, stdout);
  }
}

void run(const std::string& name) {
  if (name == "sum") sums(true);
  if (name == "sum without barriers") sums(false);
  if (name == "some return") METAPOOL_LAUNCH(some_return, 3, 32, 0, nullptr);
  if (name == "two places") METAPOOL_LAUNCH(two_places, 1, 32, 0, nullptr);
  if (name == "unwritten") unwritten();
  if (name == "beyond") METAPOOL_LAUNCH(write_at, 1, 1, 16, nullptr, 24);
  if (name == "votes") votes();
  if (name == "order") order();
  if (name == "arguments") arguments();
  if (name == "refuse") METAPOOL_LAUNCH(refuse, 1, 2, 0, nullptr);
  if (name == "after failures") after_failures();
  if (name == "launches") launches();
  if (name == "half to float") convert(__half2float);
  if (name == "float to half") convert(__float2half_rn);
  if (name == "bfloat16 to float") convert(__bfloat162float);
  if (name == "float to bfloat16") convert(__float2bfloat16_rn);
}

}  // namespace metapool::cuda

int main(int, char** arguments) {
  try {
    metapool::cuda::run(arguments[1]);
  } catch (const std::exception& problem) {
    std::printf("%s\n", problem.what());
  }
}
"""

VARIANTS = {"own switch": [], "ucontext": ["-DMETAPOOL_HOST_UCONTEXT"], "asan": build.SANITIZERS}

ORDERS = ("forward", "reversed", "random")

Run = Callable[..., bytes]


def _compile(folder: Path, flags: list[str]) -> Path:
    try:
        compiler = build.find_compiler()
    except build.CannotBuildError as problem:
        pytest.skip(str(problem))
    source, program = folder / "kernels.cu", folder / "kernels"
    source.write_text(KERNELS)
    command = [compiler, *build.FLAGS, *flags, *build.KERNEL_FLAGS, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def _runner(program: Path) -> Run:
    def run(case: str, order: str = "forward", data: bytes = b"") -> bytes:
        """What the case writes, also where a sanitizer ends it."""
        environment = {**os.environ, "METAPOOL_HOST_ORDER": order}
        done = subprocess.run(
            [str(program), case], input=data, env=environment, capture_output=True, check=False
        )
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a case under each of the ways to switch between threads."""
    return _runner(_compile(tmp_path_factory.mktemp("cuda_host"), VARIANTS[request.param]))


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_run_in_any_order(run: Run, order: str) -> None:
    assert run("sum", order) == b"32640 98176\n"
    assert run("votes", order) == b"3 3 3 3\n"
    assert run("arguments", order) == b"5 5 42\n"


def test_orders(run: Run) -> None:
    """Each thread once before the barrier and once behind it."""
    assert run("order") == b"0 1 2 3 4 5 6 7 " * 2
    assert run("order", "reversed") == b"7 6 5 4 3 2 1 0 " * 2
    shuffled = [int(word) for word in run("order", "random").split()]
    assert shuffled[:8] != shuffled[8:] != sorted(shuffled[8:])
    assert sorted(shuffled[:8]) == sorted(shuffled[8:]) == list(range(8))
    assert run("order", "random") == run("order", "random")
    assert b"METAPOOL_HOST_ORDER" in run("order", "backwards")


def test_a_missing_barrier_shows_in_some_order(run: Run) -> None:
    assert b"nan" in run("sum without barriers", "forward")
    assert run("sum without barriers", "reversed") == b"32640 98176\n"  # by chance
    assert b"nan" in run("sum without barriers", "random")


@pytest.mark.parametrize("order", ORDERS)
def test_divergent_barriers(run: Run, order: str) -> None:
    said = run("some return", order).decode()
    assert "kernel some_return, block 0: divergent barrier: thread 0 waits at" in said
    assert ", thread 5 returned" in said
    line = KERNELS[: KERNELS.index("  } else {\n    __sync")].count("\n")
    said = run("two places", order).decode()
    assert f"kernels.cu:{line}, thread 7 waits at" in said
    assert said.endswith(f"kernels.cu:{line + 2}\n")


def test_fibres_that_were_left_behind(run: Run) -> None:
    assert run("after failures") == b"32640 98176\n" * 3


def test_memory_that_nobody_wrote(run: Run) -> None:
    """Also where the block before wrote it."""
    assert run("unwritten") == b"1 1 1 1\n"


def test_writes_beyond_the_shared_memory(run: Run) -> None:
    said = run("beyond").decode()
    if "AddressSanitizer" in said:
        assert "use-after-poison" in said and "write_at" in said
    else:
        assert said == "kernel write_at, block 0: wrote 8 bytes beyond its shared memory of 16\n"


def test_exceptions_reach_the_launcher(run: Run) -> None:
    assert run("refuse") == b"refused\n"


def test_launches_that_cuda_refuses(run: Run) -> None:
    said = dict(line.split(": ") for line in run("launches").decode().splitlines())
    sizes = {"empty grid", "long grid", "empty block", "large block"}
    memory = {"unasked", "more than asked", "asked for too much"}
    assert {key for key, value in said.items() if value == "no error"} == {
        *["fine", "fine again", "asked", "most"]
    }
    assert {key for key, value in said.items() if "configuration" in value} == sizes
    assert {key for key, value in said.items() if value == "invalid argument"} == memory


def _converted(run: Run, case: str, values: np.ndarray, to: type) -> np.ndarray:
    return np.frombuffer(run(case, data=values.tobytes()), to)


def _is_nan(bits: np.ndarray, infinity: int) -> np.ndarray:
    return (bits & 0x7FFF) > infinity


@pytest.mark.parametrize(
    "name,dtype,infinity",
    [("half", torch.float16, 0x7C00), ("bfloat16", torch.bfloat16, 0x7F80)],
    ids=["half", "bfloat16"],
)
def test_conversions(run: Run, name: str, dtype: torch.dtype, infinity: int) -> None:
    """Of every number of 16 bits, and of floats halfway between two of them or next to that."""
    every = np.arange(2**16, dtype=np.uint16)
    wide = _converted(run, f"{name} to float", every, np.float32)
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    finite = ~_is_nan(every, infinity)
    assert np.array_equal(wide[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert np.isnan(wide[~finite]).all()

    with np.errstate(all="ignore"):
        halfway = ((expected.astype(np.float64) + np.roll(expected, -1)) / 2).astype(np.float32)
    some = np.random.default_rng(0).integers(0, 2**32, 2**17, dtype=np.uint32)
    near = np.concatenate([expected, halfway]).view(np.uint32)
    largest = np.array([0x477FF000, 0x477FEFFF, 0x7F7FFFFF, 1, 0x80000001], np.uint32)
    floats = np.concatenate([near, near - 1, near + 1, some, largest]).view(np.float32)
    narrow = _converted(run, f"float to {name}", floats, np.uint16)
    expected = torch.from_numpy(floats).to(dtype).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(floats)
    assert np.array_equal(narrow[number], expected[number])
    assert _is_nan(narrow[~number], infinity).all()


def test_build(tmp_path: Path) -> None:
    """Sources that have not changed are not compiled again."""
    kernels, ops = tmp_path / "csrc/cuda/some.cu", tmp_path / "python_bindings/torch_ops_cuda.cpp"
    for source in (kernels, ops):
        source.parent.mkdir(parents=True)
        source.write_text("")
    kernels.write_text("__global__ void some_kernel(int* out) { *out = threadIdx.x; }")
    folder = tmp_path / "some folder"
    try:
        library = build.build(tmp_path, folder)
    except build.CannotBuildError as problem:
        pytest.skip(str(problem))
    first = library.stat().st_mtime_ns
    assert build.build(tmp_path, folder).stat().st_mtime_ns == first
    kernels.write_text("__global__ void some_kernel(int* out) { *out = blockIdx.x; }")
    assert build.build(tmp_path, folder).stat().st_mtime_ns > first
    kernels.write_text("__global__ void some_kernel(int* out) { *out = warp; }")
    with pytest.raises(RuntimeError, match="warp"):
        build.build(tmp_path, folder)
