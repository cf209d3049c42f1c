"""The environments: what each has, what it lacks, and what runs in it."""

from dataclasses import dataclass, field

from tests.compatibility.interpreters import THIS
from tests.rooms import file_of

TORCHES = ("2.10.0", "2.11.0", "2.13.0", "newest")
PYTHONS = ("3.10", "3.12", "3.13")

# The version for what does not depend on it.
TORCH = "2.13.0"

LEFT_OUT = {
    "tests/search": "needs more than the op",
    "tests/cuda/test_cuda_host.py": "compiles the CUDA kernels itself: the same everywhere",
    "tests/cuda/test_cuda_code.py": "the same",
    "tests/triton/test_machine_code.py": "Triton's code: triton-3.6 is an environment of its own",
    "tests/house/test_mutation.py": "reads the sources of the package: the same everywhere",
    "tests/packaging/test_compatibility.py": "about this program",
}
"""Tests that do not run, each with the reason."""

KERNEL_TESTS = ("tests", "-m", "kernel", *(f"--ignore={path}" for path in LEFT_OUT))
# What another torch or a missing part could break, and is quick.
SELECTION = tuple(
    file_of(name)
    for name in (
        *("op/forward", "op/backward", "op/double_backward", "refusals/bad_input", "op/layout"),
        *("modules/modules", "modules/extra_candidates"),
        *("pytorch/func", "pytorch/opcheck", "pytorch/autocast"),
        *("pytorch/pytorch_samples", "refusals/odd_tensors"),
    )
)
# A case of each kind.
QUICK = (*SELECTION, "--part", "quick")

# What is left without compiled kernels: the definition, and what is said of the rest.
PLAIN = tuple(
    file_of(name)
    for name in (
        *("op/forward", "modules/modules", "modules/extra_candidates"),
        *("refusals/bad_input", "refusals/numpy_bad_input"),
    )
)


@dataclass(frozen=True)
class Tests:
    """One run of pytest."""

    __test__ = False  # for pytest it looks like a class of tests

    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One environment."""

    name: str
    torch: str = TORCH
    python: str = THIS
    install: str = "wheel"
    """``wheel``; ``sdist``, built beside what is installed; or ``sdist, isolated``, built in an
    environment that pip makes, as by default."""
    extras: tuple[str, ...] = ("test",)
    lowest: bool = False
    """Of everything that we ask for, the lowest version that we allow, also in the extras."""
    after: tuple[str, ...] = ()
    """Packages for pip, after ours."""
    without: tuple[str, ...] = ()
    """Of ``compiler``, ``triton``, ``numpy`` and ``numpy module``."""
    tests: tuple[Tests, ...] = (Tests(SELECTION),)
    says: tuple[str, ...] = ()
    """Regular expressions, for lines of ``python -m metapool_kernels.info``."""

    @property
    def is_native(self) -> bool:
        """Whether there have to be compiled kernels."""
        return self.install == "wheel" or "compiler" not in self.without

    @property
    def is_built_once(self) -> bool:
        """Whether the compiled libraries are those of the wheel."""
        return self.install == "wheel"


_NATIVE = r"cpu +usable on cpu"

PACKAGES = (
    Plan(
        "wheel-bare",
        torch="newest",
        without=("compiler", "triton"),
        says=(_NATIVE, r"triton +not installed", r"nvcc +not found"),
    ),
    Plan("sdist", install="sdist, isolated", says=(_NATIVE, r"torch_ops +compiler")),
    Plan(
        "sdist-no-compiler",
        install="sdist",
        without=("compiler",),
        tests=(Tests(PLAIN),),
        says=(
            r"torch_ops +not built: no C\+\+ compiler was found",
            r"cpu +not usable on cpu: .*no C\+\+ compiler was found",
            r"reference +usable on cpu",
            r"instruction set +unknown: .*no C\+\+ compiler was found",
        ),
    ),
    Plan(
        "wheel-no-numpy-module",
        without=("compiler", "numpy module"),
        says=(_NATIVE, r"instruction set +unknown: the compiled NumPy module is missing"),
    ),
    Plan(
        "wheel-no-numpy",
        without=("compiler", "numpy"),
        says=(_NATIVE, r"numpy +not installed", r"instruction set +\w+ of baseline"),
    ),
    Plan(
        "triton-3.6",
        after=("triton==3.6.0", "numpy<2.3"),  # its interpreter needs an older NumPy
        tests=(
            Tests(
                (
                    "tests/triton/test_machine_code.py::test_machine_code",
                    "tests/triton/test_machine_code.py::test_types_are_right",
                    *("-k", "sm_90 or 7x1"),
                )
            ),
            Tests(
                ("tests/op/test_forward.py", "tests/op/test_backward.py"),
                {"TRITON_INTERPRET": "1", "METAPOOL_TEST_SHARE": "0.01"},
            ),
        ),
        says=(_NATIVE, r"triton +3\.6\.0"),
    ),
    Plan(
        "lowest",
        torch=TORCHES[0],
        python=PYTHONS[0],
        install="sdist",
        extras=("search", "export", "test"),
        lowest=True,
        tests=(Tests((*QUICK, "tests/search")),),
        says=(_NATIVE, r"numpy +1\.26"),
    ),
)


def for_torch(version: str, tests: tuple[str, ...]) -> Plan:
    """The wheel under a version of torch."""
    return Plan(f"torch-{version}", torch=version, tests=(Tests(tests),), says=(_NATIVE,))


def for_python(version: str, tests: tuple[str, ...]) -> Plan:
    """The source distribution under a version of Python."""
    number = version.removesuffix("t")
    return Plan(
        f"python-{version}",
        torch="newest",
        python=version,
        install="sdist",
        tests=(Tests(tests),),
        says=(_NATIVE, rf"python +{number}\.", rf"numpy_ops .*python {number}\."),
    )


def everything(tests: tuple[str, ...]) -> list[Plan]:
    """All environments; those of a version of torch or Python run these tests."""
    return [
        *(for_torch(version, tests) for version in TORCHES),
        *PACKAGES,
        *(for_python(version, tests) for version in PYTHONS),
    ]
