"""Triton's kernels compiled before they are needed: all of them, no others, and for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from metapool_kernels import DEFAULT_CANDIDATES, fused_meta_pool
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.moments import affine_bwd
from metapool_kernels.ops import meta_pool_bwd
from metapool_kernels.search.machine.kernels import compile_ahead
from metapool_kernels.spec import PoolSpec
from tests.backends import BACKENDS

pytest.importorskip("triton")
from metapool_kernels._triton import ahead, launch

ROOT = Path(__file__).parents[2]
_BEGIN = """
import torch
from accelerate import Accelerator
from benches.gpu_check.kernels import pretend
from metapool_kernels import fused_meta_pool
from metapool_kernels._triton import ahead, launch
from metapool_kernels.search.machine import kernels
from pathlib import Path
import os
pretend()
cache = Path(os.environ["TRITON_CACHE_DIR"])
x = torch.randn(2, 16, 8, 8, requires_grad=True)
alpha = torch.randn(2, requires_grad=True)
def step(names=("skip_connect", "avg_pool_3x3")):
    out = fused_meta_pool(x, alpha, names, backend="triton")
    torch.autograd.grad(out.sum(), (x, alpha))
def folders():
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []
"""


def _run(code: str, tmp_path: Path) -> list[str]:
    """What a process prints in which the kernels are compiled for a GPU that is not there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_compiled_is_what_calls_need(tmp_path: Path) -> None:
    """Called then, they find both on disk: a GPU that is not there fails only behind that."""
    code = """
with ahead.recorded() as starts:
    step()
    step()
print(len(starts))
print(ahead.compile_starts(starts, tell=lambda done, total: print(done, "of", total)))
before = folders()
for kernel in (launch.meta_pool_fwd_kernel, launch.meta_pool_bwd_kernel):
    kernel.device_caches.clear()
real = []
for name in ahead.KERNELS:
    kernel = getattr(launch, name)
    class Stopped:
        def __getitem__(self, grid, kernel=kernel):
            def start(*args, **constants):
                try:
                    kernel[grid](*args, **constants)
                except Exception as error:
                    real.append(type(error).__name__)
            return start
    setattr(launch, name, Stopped())
step()
print(len(before), len(real), folders() == before)
"""
    said = _run(code, tmp_path)
    assert said == ["4", "1 of 2", "2 of 2", "2", "2 2 True"]


def test_a_kernel_that_does_not_compile_is_passed_over(tmp_path: Path) -> None:
    code = """
from dataclasses import replace
with ahead.recorded() as starts:
    step()
broken = replace(starts[0], constants={**starts[0].constants, "COLUMNS": 3})
print(ahead.compile_starts([broken, starts[1]]), len(list(cache.glob("*/*.cubin"))))
"""
    assert _run(code, tmp_path) == ["2 1"]


def test_the_search_compiles_before_its_first_step(tmp_path: Path) -> None:
    code = """
kernels._takes_triton = lambda device: True
print(kernels.compile_ahead(step, Accelerator(cpu=True)), len(folders()))
"""
    assert _run(code, tmp_path) == ["2 2"]


def test_on_the_cpu_nothing_is_compiled_and_nothing_runs() -> None:
    def step() -> None:
        raise AssertionError("it ran")

    assert compile_ahead(step, Accelerator(cpu=True)) == 0


@pytest.mark.skipif("triton" not in BACKENDS, reason="no tensors here go to Triton's kernels")
@pytest.mark.every
def test_recording_starts_nothing_and_ends() -> None:
    """Also where it ends by an exception, and in autograd's thread."""
    kernels = [getattr(launch, name) for name in ahead.KERNELS]
    x = torch.randn(1, 2, 5, 6, requires_grad=True)
    names = ("skip_connect", "max_pool_3x3")
    starts: list[ahead.Start] = []

    def record() -> None:
        with ahead.recorded() as found:
            out = fused_meta_pool(x, torch.zeros(2), names, backend="triton")
            out.sum().backward()
            starts.extend(found)
            raise KeyError

    with pytest.raises(KeyError):
        record()
    assert [start.kernel for start in starts] == list(ahead.KERNELS[:2])
    assert kernels == [getattr(launch, name) for name in ahead.KERNELS]
    out = fused_meta_pool(x, torch.zeros(2), names, backend="triton")
    expected = fused_meta_pool(x, torch.zeros(2), names, backend="reference")
    torch.testing.assert_close(out, expected)


def test_different_kernels_have_different_keys() -> None:
    pointer = ahead.Pointer(torch.float32, 0)
    start = ahead.Start(ahead.KERNELS[0], 4, (pointer, 16, 1), {"COUNT": 2})
    same = ahead.Start(ahead.KERNELS[0], 9, (pointer, 32, 1), {"COUNT": 2})
    assert start.key == same.key
    for arguments in (
        (ahead.Pointer(torch.bfloat16, 0), 16, 1),
        (ahead.Pointer(torch.float32, 4), 16, 1),
        (pointer, 17, 1),
        (pointer, 1, 1),
        (pointer, 2**31, 1),
        ((pointer, 16), 16, 1),
    ):
        assert ahead.Start(ahead.KERNELS[0], 4, arguments, {"COUNT": 2}).key != start.key
    assert ahead.Start(ahead.KERNELS[1], 4, start.arguments, {"COUNT": 2}).key != start.key
    assert ahead.Start(ahead.KERNELS[0], 4, start.arguments, {"COUNT": 3}).key != start.key


@pytest.mark.parametrize("form", ["mix", "stack", "fields"])
def test_a_gradient_is_one_launch(form: str) -> None:
    """However many poolings there are."""
    spec = PoolSpec(
        tuple(c.code for c in parse_candidates(DEFAULT_CANDIDATES)), (1, 1), True, False
    )
    spec, count = spec._replace(backend="triton"), len(DEFAULT_CANDIDATES)
    x, grads, terms = torch.ones(2, 3, 9, 8), torch.ones(2, 3 * count, 9, 8), torch.ones(3, count)
    with ahead.recorded() as starts:
        if form == "fields":
            affine_bwd(x, x, terms, terms, terms, terms, spec)
        else:
            grad_out, weights = (x, terms) if form == "mix" else (grads, None)
            meta_pool_bwd(grad_out, x, weights, None, spec, (True, False))
    assert [start.kernel for start in starts] == ["meta_pool_bwd_kernel"]
