"""The same bits from run to run, for any number of threads and for every instruction set."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metapool_kernels import numpy_api
from tests import cases, judge
from tests.backends import skip_or_fail
from tests.cases import CANDIDATES, Case

ROOT = Path(__file__).parents[2]


def _cases() -> Iterator[Case]:
    """Few planes and many, small and large, so that work is split in each of the ways."""
    for layout in cases.NATIVE_LAYOUTS:
        for size in (
            *((1, 1, 130, 97), (2, 3, 33, 47), (4, 48, 14, 14), (9, 65, 3, 5)),
            (2, 16, 75, 40),
        ):
            yield Case(size, layout=layout, data="relu6", alpha="nck")
            yield Case(size, torch.bfloat16, layout)
            yield Case(size, layout=layout, data="relu6", alpha="ck", count_include_pad=False)
        for alpha in cases.ALPHA_SHAPES:
            yield Case((5, 17, 21, 19), torch.float32, layout, alpha=alpha)
        yield Case((2, 40, 13, 17), torch.float64, layout, candidates=CANDIDATES["largest"])
        yield Case((2, 40, 13, 17), torch.float16, layout, "nan", CANDIDATES["strips"], stride=2)
        for size in ((1, 16, 75, 40), (9, 65, 3, 5), (1, 1, 130, 97)):
            yield Case(size, layout=layout, data="relu6", candidates=CANDIDATES["pyramid"])
            yield Case(size, layout=layout, candidates=CANDIDATES["huge"], form="stack")
            yield Case(size, layout=layout, data="relu6", form="normalized")
            yield Case(size, torch.bfloat16, layout, form="normalized", count_include_pad=False)
        # No square windows: the kernels that can do everything, in strips of one plane and packed.
        for size in ((1, 1, 130, 97), (4, 48, 14, 14)):
            yield Case(size, layout=layout, candidates=CANDIDATES["unsorted"], normalize=None)
            yield Case(size, layout=layout, candidates=CANDIDATES["unsorted"], form="normalized")
            yield Case(size, layout=layout, candidates=CANDIDATES["rectangular"], stride=(2, 1))


CASES = tuple(_cases())


def _bits(case: Case, backend: str) -> list[torch.Tensor]:
    x, alpha, grad_out = case.tensors()
    results = judge.run(judge.fused(backend), case, x, alpha, grad_out)
    if case.form == "normalized":  # second order sums as PyTorch does, which depends on threads
        return [judge.bits(tensor) for tensor in results.values()]
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    out = judge.fused(backend)(x, alpha, case)
    grads = torch.autograd.grad(
        out, (x, alpha), grad_out, create_graph=True, materialize_grads=True
    )
    both = sum(grad.float().square().sum() for grad in grads)
    second = torch.autograd.grad(both, (x, alpha), materialize_grads=True)
    return [judge.bits(tensor) for tensor in (*results.values(), *second)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(native: str, case: Case) -> None:
    torch.set_num_threads(1)
    expected = _bits(case, native)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for a, b in zip(_bits(case, native), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_to_run(native: str, case: Case) -> None:
    torch.set_num_threads(2)
    expected = _bits(case, native)
    for _ in range(3):
        for a, b in zip(_bits(case, native), expected, strict=True):
            assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch(native: str) -> None:
    """Each plane of the output is computed alone, wherever it lies."""
    case = Case((6, 5, 11, 13), alpha="nck")
    x, alpha, _ = case.tensors()
    whole = judge.fused(native)(x, alpha, case)
    for n in range(6):
        single = judge.fused(native)(x[n : n + 1], alpha[n : n + 1], case)
        assert torch.equal(single[0], whole[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("side", [11, 45])
def test_a_plane_does_not_depend_on_those_computed_before_it(
    native: str, side: int, layout: str, dtype: torch.dtype
) -> None:
    """A NaN takes the sixteen planes around it another way, and stays there when these are done."""
    case = Case((1, 17, side, side), dtype, layout, alpha="ck")
    x, alpha, grad_out = case.tensors()
    with_nan = x.detach().clone()
    with_nan[0, 3, 5, 5] = torch.nan
    runs = [judge.run(judge.fused(native), case, y, alpha, grad_out) for y in (x, with_nan)]
    for key in judge.ALL:
        a, b = (judge.bits(run[key]) for run in runs)
        last = (16,) if key == "grad_alpha" else (0, 16)
        assert torch.equal(a[last], b[last]), key


def test_deterministic_algorithms_are_no_obstacle(native: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        judge.results(judge.fused(native), Case())
    finally:
        torch.use_deterministic_algorithms(False)


def digests() -> dict[str, str]:
    """For each case a digest of all its bits; run in a process of its own for one set."""
    found = {}
    for case in CASES:
        hashed = hashlib.sha256()
        for tensor in _bits(case, "cpu"):
            hashed.update(tensor.numpy().tobytes())
        found[str(case)] = hashed.hexdigest()
    return found


def _digests_under(isa: str | None) -> tuple[str, dict[str, str]]:
    code = (
        "import json, torch; torch.set_num_threads(1)\n"
        "from metapool_kernels.numpy_api import active_isa\n"
        "from tests.op.test_determinism import digests\n"
        "print(json.dumps([active_isa(), digests()]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "METAPOOL_ISA"}
    if isa is not None:
        environment["METAPOOL_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    active, found = json.loads(done.stdout.splitlines()[-1])
    return active, found


def _isa_names() -> list[str]:
    try:
        return numpy_api.isa_names()
    except RuntimeError:
        return []


@pytest.fixture(scope="module")
def default_digests() -> tuple[str, dict[str, str]]:
    if not _isa_names():
        skip_or_fail("the instruction sets are not known without the NumPy module")
    return _digests_under(None)


@pytest.mark.parametrize(
    "isa",
    ["baseline", *(pytest.param(isa, marks=pytest.mark.costly) for isa in ("avx2", "avx512"))],
)
def test_every_instruction_set_gives_the_same_bits(
    native: str, isa: str, default_digests: tuple[str, dict[str, str]]
) -> None:
    if isa not in _isa_names():
        pytest.skip(f"this machine does not have {isa}, or it was not built")
    active, expected = default_digests
    assert active == _isa_names()[-1], "the default is the last, the fastest"
    used, found = _digests_under(isa)
    assert used == isa
    assert [case for case in expected if found[case] != expected[case]] == []


def test_an_unknown_instruction_set_is_not_taken_silently(native: str) -> None:
    """It is refused with its name, or the default runs; nothing crashes."""
    code = (
        "import torch; from metapool_kernels import fused_meta_pool\n"
        "fused_meta_pool(torch.ones(1, 1, 3, 3), torch.ones(7), backend='cpu')"
    )
    environment = os.environ | {"METAPOOL_ISA": "neon9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode >= 0, "killed by a signal"
    assert done.returncode == 0 or "neon9" in done.stderr


def test_a_wrong_instruction_set_is_named(native: str) -> None:
    """Each time that it is asked for, and only as long as the variable is set."""
    code = (
        "import os\n"
        "from metapool_kernels import numpy_api\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        numpy_api.active_isa()\n"
        "    except ValueError as error:\n"
        "        assert 'bogus' in str(error) and 'baseline' in str(error)\n"
        "    else:\n"
        "        raise AssertionError('accepted')\n"
        "del os.environ['METAPOOL_ISA']\n"
        "assert numpy_api.active_isa() == numpy_api.isa_names()[-1]\n"
    )
    environment = os.environ | {"METAPOOL_ISA": "bogus"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
