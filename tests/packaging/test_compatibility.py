"""The tool that tests installed packages: what it asks for, reads and refuses."""

import io
import json
import re
import sys
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from metapool_kernels.version import __version__
from tests.compatibility import artifacts, interpreters, plans
from tests.compatibility.__main__ import chosen, parse, summary
from tests.compatibility.environments import Counts, Result

JUNIT = """<testsuites><testsuite tests="5">
<testcase name="a"/><testcase name="b"><properties/></testcase>
<testcase name="c"><failure message="wrong">...</failure></testcase>
<testcase name="d"><error message="broken">...</error></testcase>
<testcase name="e"><skipped message="no GPU">...</skipped></testcase>
</testsuite></testsuites>"""

FILES = ["setup.py", ".ci/run", "csrc/a.h", "metapool_kernels/__init__.py"]


def test_everything_is_the_default() -> None:
    names = [plan.name for plan in chosen(parse([]))]
    assert len(names) == len(set(names))
    assert {"torch-2.10.0", "torch-newest", "python-3.10", "sdist-no-compiler"} < set(names)
    count = len(plans.TORCHES) + len(plans.PACKAGES) + len(plans.PYTHONS)
    assert len(names) == count


def test_what_is_asked_for() -> None:
    arguments = ["--torch", "2.13.0", "2.12.1", "--packages", "triton-3.6"]
    names = [plan.name for plan in chosen(parse(arguments))]
    assert names == ["torch-2.13.0", "torch-2.12.1", "triton-3.6"]
    assert [plan.name for plan in chosen(parse(["--python", "3.14"]))] == ["python-3.14"]
    (quick,) = chosen(parse(["--python", "3.14", "--quick"]))
    assert quick.tests == (plans.Tests(plans.QUICK),)
    packages = [plan.name for plan in plans.PACKAGES]
    assert [plan.name for plan in chosen(parse(["--packages"]))] == packages


def test_an_unknown_environment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--packages", "wheel"])
    assert "got ['wheel']" in capsys.readouterr().err


def test_the_lowest_versions_of_every_extra(tmp_path: Path) -> None:
    """What is declared in pyproject.toml, which the wheel repeats."""
    (plan,) = [plan for plan in plans.PACKAGES if plan.lowest]
    text = (artifacts.ROOT / "pyproject.toml").read_text()
    declared = {extra: _requirements(text, extra) for extra in (*plan.extras, "bench")}
    assert all(declared.values())
    file = tmp_path / "package.whl"
    with zipfile.ZipFile(file, "w") as archive:
        lines = ["Name: metapool_kernels", "Requires-Dist: torch>=2.10"]
        for extra, requirements in declared.items():
            lines += [f"Requires-Dist: {r}; extra == '{extra}'" for r in requirements]
        archive.writestr("metapool_kernels-1.dist-info/METADATA", "\n".join(lines))
    found = artifacts.lowest(artifacts.Artifacts(file, file, tmp_path).requirements)
    assert {"timm==1.0.20", "jsonargparse==4.49", "accelerate==1.6", "pytest==8"} <= set(found)
    assert len(found) == len({r for requirements in declared.values() for r in requirements})
    assert not [line for line in found if line.startswith("torch==")]


def _requirements(text: str, extra: str) -> list[str]:
    """Of one extra in pyproject.toml, which Python 3.10 has no reader for."""
    (block,) = re.findall(rf"^{extra} = \[(.*?)\](?: #.*)?$", text, re.DOTALL | re.MULTILINE)
    return re.findall(r'"([^"]+)"', block)


def test_interpreters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not run, as pyenv's shims do, is passed over for one that does."""
    assert interpreters.find(interpreters.THIS) == sys.executable
    for path, text in {
        "bin/python9.8": "exit 1",
        "versions/9.8.2/bin/python": "echo 9.8",
        "versions/9.8.3t/bin/python": "echo 9.8t",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert interpreters.find("9.8") == str(tmp_path / "versions/9.8.2/bin/python")
    assert interpreters.find("9.8t") == str(tmp_path / "versions/9.8.3t/bin/python")
    assert interpreters.find("9.7") is None


def test_outcomes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(JUNIT)
    counts = Counts()
    counts.add(file)
    counts.add(file)
    assert (counts.passed, counts.failed, counts.skipped) == (4, 4, {"no GPU": 2})
    results = [Result("a", counts=counts), Result("b", problems=["pytest ended with 2"])]
    assert json.loads(json.dumps(asdict(results[0])))["counts"]["skipped"] == {"no GPU": 2}
    assert results[0].row()[3:6] == ("4", "4", "2")
    assert summary(results) == "2 environments: 1 passed, 4 tests"


def _sdist(folder: Path, names: list[str]) -> Path:
    file = folder / "sdist.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name in [*names, "PKG-INFO"]:
            archive.addfile(tarfile.TarInfo(f"metapool_kernels-1/{name}"), io.BytesIO())
    return file


def _wheel(folder: Path, names: list[str]) -> Path:
    file = folder / "package.whl"
    metadata = f"metapool_kernels-{__version__}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name in [*names, f"{metadata}/METADATA", f"{metadata}/entry_points.txt"]:
            archive.writestr(name, "")
        archive.writestr(f"{metadata}/licenses/LICENSE", "")
    return file


def test_contents_of_the_source_distribution(tmp_path: Path) -> None:
    shipped = [name for name in FILES if name != ".ci/run"]
    artifacts.check_sdist(_sdist(tmp_path, shipped), FILES)
    with pytest.raises(artifacts.ArtifactError, match=r"sdist.tar.gz lacks csrc/a\.h"):
        artifacts.check_sdist(_sdist(tmp_path, [*shipped[:1], *shipped[2:]]), FILES)
    extra = "metapool_kernels/_build.json"
    with pytest.raises(artifacts.ArtifactError, match=f"should not hold {extra}"):
        artifacts.check_sdist(_sdist(tmp_path, [*shipped, extra]), FILES)


def test_contents_of_the_wheel(tmp_path: Path) -> None:
    package = [FILES[-1], "metapool_kernels/_build.json"]
    artifacts.check_wheel(_wheel(tmp_path, [*package, "metapool_kernels/_torch_ops.so"]), FILES)
    with pytest.raises(artifacts.ArtifactError, match=r"package.whl lacks metapool_kernels/_build"):
        artifacts.check_wheel(_wheel(tmp_path, FILES[-1:]), FILES)
    with pytest.raises(artifacts.ArtifactError, match=r"should not hold tests/__init__\.py"):
        artifacts.check_wheel(_wheel(tmp_path, [*package, "tests/__init__.py"]), FILES)


@pytest.mark.parametrize("copies", [(), ("metapool_kernels.libs/libtorch_cpu-1a2b.so.2",)])
def test_a_wheel_for_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: tuple[str, ...]
) -> None:
    """It has another name, and no library but ours."""
    ours = ("metapool_kernels/_torch_ops.so", "metapool_kernels/_numpy_ops.cpython-311.so")
    wheel = _wheel(tmp_path, [*ours])
    assert artifacts.libraries(wheel).keys() == {Path(name).name for name in ours}
    name = "package-cp311-cp311-manylinux_2_34_x86_64.whl"

    def repair(command: list[str], folder: Path, log: Path) -> None:
        assert {"--exclude=libtorch*", "--exclude=libc10*"} < set(command)
        made = Path(command[command.index("--wheel-dir") + 1])
        made.mkdir(parents=True)
        _wheel(made, [*ours, *copies]).rename(made / name)

    monkeypatch.setattr(artifacts, "_run", repair)
    if copies:
        with pytest.raises(artifacts.ArtifactError, match=f"{name} needed copies of libraries"):
            artifacts.for_other_machines(wheel, tmp_path / "dist", tmp_path / "log")
    else:
        found = artifacts.for_other_machines(wheel, tmp_path / "dist", tmp_path / "log")
        assert found == tmp_path / "dist" / name and list(found.parent.iterdir()) == [found]
