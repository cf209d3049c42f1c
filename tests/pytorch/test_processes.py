"""Calls from several threads of Python, and in processes that are forked, spawned or load data.

What PyTorch itself does not promise is not tested: after a call on several threads a forked child
may start no parallel region of its own, as the threads of the pool that it inherits do not exist.
With one thread, which is what DataLoader gives its workers, it may.
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests import judge
from tests.backends import BACKENDS
from tests.cases import CANDIDATES, Case

ROOT = Path(__file__).parents[2]
LIMIT = 300
"""Seconds after which a process that does not end has failed; a tenth of a second is usual."""

pytestmark = pytest.mark.skipif("reference" not in BACKENDS, reason="they run on the CPU")

CASES = (
    Case((4, 48, 14, 14), alpha="nck", data="relu6"),
    Case((2, 16, 75, 40), torch.bfloat16, "channels_last"),
    Case((1, 1, 130, 97), candidates=CANDIDATES["largest"]),
    Case((2, 40, 13, 17), torch.float64, candidates=CANDIDATES["strips"], stride=2, data="nan"),
)


def results(case: Case, backend: str) -> list[Tensor]:
    """The bits of a forward and a backward."""
    return [judge.bits(t) for t in judge.results(judge.fused(backend), case).values()]


def _equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_eight_threads_at_once(backend: str, count: int) -> None:
    """Each of them with other maps than its neighbours, several times over."""
    torch.set_num_threads(count)
    expected = [results(case, backend) for case in CASES]
    start = threading.Barrier(8)

    def work(number: int) -> bool:
        torch.set_num_threads(count)  # OpenMP keeps it for each thread
        start.wait(LIMIT)
        order = [(number + i) % len(CASES) for i in range(2 * len(CASES))]
        return all(_equal(results(CASES[i], backend), expected[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


@pytest.mark.usefixtures("threads")
def test_eight_threads_share_their_arguments(backend: str) -> None:
    """One x and one alpha, whose gradients each thread computes for itself."""
    torch.set_num_threads(1)
    x, alpha, grad_out = CASES[0].tensors()
    leaves = x.requires_grad_(), alpha.requires_grad_()

    def work(_: int) -> list[Tensor]:
        out = judge.fused(backend)(*leaves, CASES[0])
        return [judge.bits(t) for t in (out, *torch.autograd.grad(out, leaves, grad_out))]

    expected = work(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(_equal(got, expected) for got in pool.map(work, range(32)))


_FIRST_CALLS = """
import threading, torch
from metapool_kernels import fused_meta_pool, numpy_api
torch.set_num_threads(1)
x, alpha = torch.linspace(-1, 1, 960).view(1, 20, 6, 8), torch.linspace(-1, 1, 7)
start, got = threading.Barrier(8), [None] * 8

def work(i):
    start.wait(60)
    if i % 2:
        got[i] = torch.from_numpy(numpy_api.meta_pool(x.numpy(), torch.softmax(alpha, 0).numpy()))
    else:
        got[i] = fused_meta_pool(x, alpha, backend="cpu")

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(torch.equal(found, got[0]) for found in got)
"""


@pytest.mark.usefixtures("native")
def test_the_first_calls_come_from_eight_threads() -> None:
    """They choose the instruction set, of the torch ops and of the NumPy module, all at once."""
    _run(_FIRST_CALLS)


def _run(code: str) -> str:
    """What it prints. It sees no GPU, for each of which autograd would start a thread."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=LIMIT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["fork", "spawn"])
def method(request: pytest.FixtureRequest) -> str:
    """How this very process starts another."""
    if request.param == "fork" and torch.accelerator.is_available():
        pytest.skip("autograd, which has a thread for each accelerator, refuses to work in a fork")
    return str(request.param)


class _Pooled(Dataset[Tensor]):
    """Maps that a worker pools, forward and backward."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, index: int) -> list[Tensor]:
        assert torch.utils.data.get_worker_info() is not None
        return results(CASES[index], self.backend)


def test_workers_of_a_data_loader(native: str, method: str) -> None:
    expected = [results(case, native) for case in CASES]
    loader = DataLoader(
        _Pooled(native), None, num_workers=2, multiprocessing_context=method, timeout=LIMIT
    )
    assert all(_equal(got, right) for got, right in zip(loader, expected, strict=True))


def _child(queue: "torch.multiprocessing.Queue[list[bytes]]", backend: str) -> None:
    torch.set_num_threads(1)
    queue.put([t.numpy().tobytes() for case in CASES for t in results(case, backend)])


@pytest.mark.usefixtures("threads")
def test_a_process_after_use_with_one_thread(backend: str, method: str) -> None:
    """It computes the same bits as its parent, which goes on computing them."""
    torch.set_num_threads(1)
    expected = [results(case, backend) for case in CASES]
    context = torch.multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, backend))
    process.start()
    try:
        got = queue.get(timeout=LIMIT)  # raises queue.Empty where the child hangs or has died
        process.join(LIMIT)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert got == [t.numpy().tobytes() for found in expected for t in found]
    assert all(
        _equal(results(case, backend), right) for case, right in zip(CASES, expected, strict=True)
    )


# Alone in its process, where no other test has started threads.
_COUNT = """
import json, os, threading, time, numpy, torch
from metapool_kernels import fused_meta_pool, numpy_api
x = torch.randn(8, 32, 56, 56, requires_grad=True)
alpha = torch.randn(7, requires_grad=True)
most, done = 0, threading.Event()

def tasks():
    return len(os.listdir("/proc/self/task"))

def watch():
    global most
    while not done.is_set():
        most = max(most, tasks())
        time.sleep(0.001)

def numpy_calls():
    arrays = x.detach().numpy(), alpha.detach().numpy()
    numpy_api.meta_pool_grad(numpy_api.meta_pool(*arrays), *arrays)

def torch_calls():
    torch.autograd.grad(fused_meta_pool(x, alpha, backend="cpu").sum(), (x, alpha))

def aten_calls():
    torch.autograd.grad(torch.nn.functional.max_pool2d(x, 3, 1, 1).sum(), x)

found = {}
for name, count in (
    ("numpy", 3), ("torch", 1), ("torch", 2), ("torch", 3), ("numpy", 1), ("aten", 3)
):
    torch.set_num_threads(count)  # starts threads that have nothing to do with calls
    most, before = 0, tasks()
    done.clear()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        globals()[f"{name}_calls"]()
    done.set()
    watcher.join()
    # Joined when Python is through with it, which is before its task has gone.
    while os.path.exists(f"/proc/self/task/{watcher.native_id}"):
        time.sleep(0.001)
    found[f"{name} {count}"] = max(most - 1, tasks()) - before
print(json.dumps(found))
"""


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_more_threads_than_those_of_torch() -> None:
    """What calls add, counted while they run and after them; torch keeps what it has started.

    The op runs on torch's threads and starts none; the NumPy functions stay on the caller's.
    """
    started = json.loads(_run(_COUNT))
    assert started == {
        "numpy 3": 0, "torch 1": 0, "torch 2": 1, "torch 3": 1, "numpy 1": 0, "aten 3": 0
    }  # fmt: skip
