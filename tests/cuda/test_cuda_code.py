"""The CUDA kernels compiled for GPUs that need not be there, and what their machine code says."""

from itertools import product
from pathlib import Path
from statistics import median

import pytest

from tests.backends import SAMPLED

pytest.importorskip("triton")  # its wheel has the tools that read machine code
if SAMPLED:
    pytest.skip("the code is the same wherever the kernels run", allow_module_level=True)

from benches import cuda_code
from benches.cuda_code import CudaKernel
from tests.recorded import SLACK, Ratchet, assert_no_worse, minor

pytestmark = pytest.mark.costly  # nvcc takes minutes where setup.py has not compiled them already

FIGURES = Path(__file__).parent / "cuda_code.json"
"""What each kernel needs, as it was when it was last improved.

``METAPOOL_WRITE_RATCHET=1 pytest tests/cuda/test_cuda_code.py`` writes it again.
"""

CAPABILITIES = (75, 80, 90, 100)
BACKWARD = ("backward", "backward side by side", "backward of fields")
FORWARD = ("forward", "forward side by side", "forward of moments", "forward of products")
HALVES = ("float16", "bfloat16")
STREAMED = [
    ", ".join(words)
    for words in product(
        (*FORWARD, *BACKWARD),
        ("avg", "max", "avg+max"),
        ("float32", *HALVES),
        ("vectors", "dense", "strided"),
    )
]
STREAMED += [
    ", ".join(("backward by two columns", *words))
    for words in product(("avg", "max", "avg+max"), HALVES, ("vectors", "dense", "strided"))
]
"""For devices whose shared memory is too small for four."""
GENERAL = [
    f"general {what}, {dtype}"
    for what in (
        *FORWARD,
        *("places of maxima", "averages", "gradient of weights"),
        *("gradient of x", "gradient of x side by side", "gradient of x of fields"),
    )
    for dtype in ("float32", "float64", *HALVES)
]
TOTALS = (
    "total, float32",
    "total, float64",
    "total of moments, float64",
    "total of products, float64",
)
NO_MAPS = ("places", "general averages", "weights", "moments", "products")
"""Words of kernels that write none."""
NAMES = [*STREAMED, *GENERAL, *TOTALS]


every_capability = pytest.mark.parametrize(
    "capability",
    [pytest.param(c, marks=() if c == 90 else (pytest.mark.slow,)) for c in CAPABILITIES],
)


def _ratchet(capability: int) -> Ratchet:
    return Ratchet(FIGURES, "nvcc", minor(cuda_code.nvcc_version()), capability)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """All that is asked for at once, which takes all cores for a minute or two."""
    if cuda_code.find_nvcc() is None:
        pytest.skip("nvcc was not found")
    tests = [item for item in request.session.items if item.path == request.path]
    calls = [test.callspec for test in tests if hasattr(test, "callspec")]
    cuda_code.compile_all({call.params["capability"] for call in calls})


@every_capability
def test_names(capability: int) -> None:
    """No kernel is left out below, and none is kept that is gone."""
    assert sorted(cuda_code.kernels(capability)) == sorted(NAMES)
    assert _ratchet(capability).table().keys() == set(NAMES)


def test_keys_can_number_the_rows_of_a_strip() -> None:
    """Of so many planes that none would be cut, which no test has the memory for."""
    rows = cuda_code.facts(1, 2**20, 10**6, 4, False, 128, 4, 2)["strip_rows"]
    assert rows <= cuda_code.facts()["most_strip_rows"]


def _wide(kernel: CudaKernel, access: str) -> str:
    """The instruction that loads or stores all columns of a lane."""
    bits = kernel.columns * (16 if any(half in kernel.name for half in HALVES) else 32)
    return f"{access}.E" if bits == 32 else f"{access}.E.{bits}"


def _has_keys(name: str) -> bool:
    """Whether a kernel finds the places of maxima by keys."""
    return (
        name.startswith("backward")
        and not name.startswith("backward of fields")
        and "max" in name
        and any(half in name for half in HALVES)
    )


def _is_for_larger(kernel: CudaKernel) -> bool:
    """Whether two columns stand in for the four of a kernel where shared memory is scarce."""
    return kernel.capability < 80 and kernel.columns == 4 and kernel.name.startswith("backward")


@every_capability
@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name: str, capability: int) -> None:
    kernel = cuda_code.kernels(capability)[name]
    code = " ".join(kernel.code.instructions)
    atomics = kernel.code.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS", "CAS", "UREDGR")
    assert atomics == 0, "atomics are not deterministic"
    assert kernel.blocks > 0 or _is_for_larger(kernel), "a block needs more than a processor has"
    if capability >= 80 and "bfloat16" in name and not any(what in name for what in NO_MAPS):
        assert "F2FP.BF16" in code, "bfloat16 is rounded by one instruction"
        packed = [x for x in kernel.code.instructions if x.startswith("F2FP")]
        assert not any(".RZ" in x for x in packed), "bfloat16 is rounded to the nearest"
    if capability >= 80 and kernel.is_streamed and "max" in name:
        assert "FMNMX.NAN" in code or "FMNMX3.NAN" in code, "a maximum has to pass NaN on"
    if capability >= 90 and _has_keys(name):
        rows = max(kernel.code.loops, key=len)
        used = {name.split(".")[0] for name in kernel.code.instructions[rows.start : rows.stop]}
        assert "VIMNMX3" in used, "three keys are compared by one instruction"
        assert not used & {"VIADDMNMX", "IABS"}, "ptxas has had wrong code there"


@every_capability
@pytest.mark.parametrize("name", [name for name in STREAMED if "strided" not in name])
def test_loads_are_ahead(name: str, capability: int) -> None:
    """Memory takes hundreds of cycles: half of the loads stand at least a row before their use."""
    _ratchet(capability).table()  # of versions that are in none nobody knows it
    distances = cuda_code.kernels(capability)[name].load_distances()
    assert median(distances) >= 120


@every_capability
@pytest.mark.parametrize("name", NAMES)
def test_ratchet(name: str, capability: int) -> None:
    """How good the code is, which depends on the version of nvcc."""
    kernel = cuda_code.kernels(capability)[name]
    found = {
        "registers": kernel.code.registers,
        "shared": kernel.shared,
        "blocks": kernel.blocks,
        "threads": kernel.blocks * kernel.threads,
        "spilled": kernel.code.stack,
    }
    ratchet = _ratchet(capability)
    if ratchet.writes:
        ratchet.record(name, found)
        return
    kept = ratchet.kept(name)
    assert_no_worse(found, kept, "registers", "shared", "spilled")
    assert kept["spilled"] or kernel.code.count("LDL", "STL") == 0, "registers are spilled"
    for figure in ("blocks", "threads"):
        assert found[figure] * SLACK >= kept[figure], (
            f"fewer resident {figure} than when this was last improved"
        )


@every_capability
@pytest.mark.parametrize("name", [name for name in STREAMED if "vectors" in name])
def test_all_columns_at_a_time(name: str, capability: int) -> None:
    """nvcc takes a vector apart of which only some columns are read, but never one for stores."""
    _ratchet(capability).table()
    kernel = cuda_code.kernels(capability)[name]
    found = {name.removesuffix(".SYS") for name in kernel.code.instructions}  # Turing says more
    writes = {"STG"} - {"STG" for what in NO_MAPS if what in name}
    assert {_wide(kernel, access) for access in {"LDG", *writes}} <= found
    assert "STG.E.U16" not in found
