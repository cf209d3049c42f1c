"""The CPU kernels on an emulated AArch64 give the same bits as this machine's instruction sets."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.arm import build

pytestmark = pytest.mark.skipif(
    "METAPOOL_ARM" not in os.environ, reason="`make test-arm` builds what these tests run"
)
ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the programs lie."""
    if problem := build.find_problem():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    return Path(os.environ["METAPOOL_ARM"])


def _run(*command: str | Path, isa: str = "") -> str:
    """What a program prints, which has to end well."""
    environment = {**os.environ, "METAPOOL_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-500:]}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def isas(folder: Path) -> list[str]:
    """Those of this machine."""
    return _run(folder / "here/sweep", "--isas").split()


@pytest.fixture(scope="module")
def emulated(folder: Path) -> list[str]:
    """A line for each call on AArch64."""
    return _run(build.EMULATOR, folder / "sweep").splitlines()


def test_vectors_are_what_their_elements_are(folder: Path) -> None:
    assert "vectors of 16 bytes: 0 failures" in _run(build.EMULATOR, folder / "words")


@pytest.mark.parametrize("isa", ISAS)
def test_vectors_of_this_machine_are_too(folder: Path, isas: list[str], isa: str) -> None:
    if isa not in isas:
        pytest.skip(f"this machine has {', '.join(isas)}")
    assert " bytes: 0 failures" in _run(folder / f"here/words_{isa}")


@pytest.mark.parametrize("isa", ISAS)
def test_every_call_gives_the_same_bits(
    folder: Path, isas: list[str], emulated: list[str], isa: str
) -> None:
    if isa not in isas:
        pytest.skip(f"this machine has {', '.join(isas)}")
    here = _run(folder / "here/sweep", isa=isa).splitlines()
    assert len(here) == len(emulated) > 6000
    other = [line for line, expected in zip(emulated, here, strict=True) if line != expected]
    assert other[:10] == [], f"{len(other)} of {len(here)} calls give other bits on AArch64"
