"""For which GPUs setup.py compiles the CUDA kernels, with what, and when it does not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from metapool_kernels import dispatch
from tests import setup_script

VARIABLES = tuple(f"METAPOOL_{name}" for name in ("BUILD_CUDA", "CUDA_ARCHS"))
VARIABLES += ("CUDA_HOME", "CUDA_PATH")


Gpus = Callable[..., None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Sets what nvidia-smi prints; at first there is no GPU."""
    program = tmp_path / "driver" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def print_lines(*lines: str) -> None:
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)

    print_lines("No devices were found")
    return print_lines


@pytest.fixture
def script(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment that asks for nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return setup_script.load()


def _fake_nvcc(
    folder: Path, codes: str = "sm_75 sm_80 sm_90 sm_120", otherwise: str = "exit 0"
) -> Path:
    """A compiler that answers questions, and does something else with sources."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f"case $1 in --version) echo 'release 12.4, V12.4.99';;"
        f" --list-gpu-code) printf '%s\\n' {codes};; *) {otherwise};; esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    "text, codes",
    [
        ("80;90;90+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0, 9.0+ptx", ["sm_80", "sm_90", "compute_90"]),
        ("90", ["sm_90"]),
        ("89 12.0 120+PTX;", ["sm_89", "sm_120", "compute_120"]),
    ],
)
def test_architectures(script: ModuleType, text: str, codes: list[str]) -> None:
    assert script.cuda_codes(text) == codes


@pytest.mark.parametrize("text", ["8", "sm_80", "80+PTX+PTX", "80;;x", "Hopper", "8.0.0", "90a"])
def test_a_wrong_architecture_is_named(script: ModuleType, text: str) -> None:
    with pytest.raises(
        script.SettingError, match="METAPOOL_CUDA_ARCHS should be entries"
    ) as raised:
        script.cuda_codes(text)
    assert repr(text) in str(raised.value)


def test_an_old_architecture_is_refused(script: ModuleType) -> None:
    with pytest.raises(script.SettingError, match=r"need 75 or newer, got '7\.0'"):
        script.cuda_codes("7.0;80")
    oldest = dispatch._OLDEST_CAPABILITY["cuda"]
    assert oldest == (script.OLDEST_CUDA_ARCH // 10, script.OLDEST_CUDA_ARCH % 10)


BOTH = ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    "lines, build, named, codes",
    [
        (["9.0"], None, None, ["sm_90"]),
        (["9.0", "8.0", "9.0"], None, None, ["sm_80", "sm_90"]),
        (["7.0", "9.0"], None, None, ["sm_90"]),
        (["7.5"], None, None, ["sm_75"]),
        (["12.0"], "1", None, ["sm_120"]),
        (["9.0"], None, "80+PTX", ["sm_80", "compute_80"]),
        (["9.0"], None, "", ["sm_90"]),
        (["13.0", "8.0"], None, None, BOTH),
        (["7.0"], "1", None, BOTH),
        (["No devices were found"], "1", None, BOTH),
        (["No devices were found"], "1", "90", ["sm_90"]),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_cuda_is_compiled_for_what_is_there(
    script: ModuleType,
    gpus: Gpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    build: str | None,
    named: str | None,
    codes: list[str],
) -> None:
    """Or for what is named; a GPU that nvcc does not know compiles PTX, an old one is left out."""
    gpus(*lines)
    for name, value in (("BUILD_CUDA", build), ("CUDA_ARCHS", named)):
        if value is not None:
            monkeypatch.setenv(f"METAPOOL_{name}", value)
    assert script.choose_codes(str(_fake_nvcc(tmp_path))) == codes


@pytest.mark.parametrize("lines", [["No devices were found"], ["7.0", "[N/A]"], ["exit 9.0"]])
@pytest.mark.parametrize("named", [None, "90"])
def test_without_a_gpu_nothing_of_cuda_is_compiled(
    script: ModuleType,
    gpus: Gpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    named: str | None,
) -> None:
    """Unless that is asked for: the reason says how."""
    gpus(*lines)
    if named is not None:
        monkeypatch.setenv("METAPOOL_CUDA_ARCHS", named)
    nvcc = _fake_nvcc(tmp_path / "bin", otherwise="exit 1")
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    graph = script.Graph("c++")
    before = list(graph.lines)
    skipped = script.add_cuda(graph, tmp_path / "library.so")["skipped"]
    assert skipped == (
        "nvidia-smi shows no GPU of compute capability 75 or newer; METAPOOL_BUILD_CUDA=1 compiles "
        "them all the same"
    )
    assert graph.lines == before
    monkeypatch.setenv("METAPOOL_BUILD_CUDA", "1")
    with pytest.raises(script.SettingError, match=r"METAPOOL_BUILD_CUDA=1, but .* cannot compile"):
        script.add_cuda(graph, tmp_path / "library.so")


def test_a_driver_without_its_program(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert script.gpu_archs() == []


def test_an_architecture_that_nvcc_does_not_know(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the build where it was asked for; else only the CUDA kernels are left out."""
    monkeypatch.setenv("METAPOOL_BUILD_CUDA", "1")
    nvcc = str(_fake_nvcc(tmp_path, "sm_75 sm_80"))
    message = r"does not know sm_90, compute_90; .*`nvcc --list-gpu-code` shows: sm_75 sm_80"
    with pytest.raises(script.CannotBuildError, match=message):
        script.choose_codes(nvcc)
    monkeypatch.setenv("METAPOOL_CUDA_ARCHS", "90+PTX")
    with pytest.raises(script.SettingError, match=message):
        script.choose_codes(nvcc)
    monkeypatch.setenv("METAPOOL_CUDA_ARCHS", "80+PTX")
    assert script.choose_codes(nvcc) == ["sm_80", "compute_80"]


def test_where_nvcc_is_looked_for(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (_fake_nvcc(tmp_path / name / "bin") for name in "abc")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "c"))
    monkeypatch.setenv("PATH", "")
    assert script.find_nvcc() == str(third)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "b"))
    assert script.find_nvcc() == str(second)
    monkeypatch.setenv("PATH", str(first.parent))
    assert script.find_nvcc() == str(first)
    monkeypatch.setenv("METAPOOL_BUILD_CUDA", "0")
    with pytest.raises(script.CannotBuildError, match="METAPOOL_BUILD_CUDA=0 switched the build"):
        script.find_nvcc()


def test_a_missing_nvcc_is_an_error_only_when_asked_for(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    graph = script.Graph("c++")
    before = list(graph.lines)
    skipped = script.add_cuda(graph, tmp_path / "library.so")["skipped"]
    assert skipped == "nvcc was not found (looked on PATH and in /usr/local/cuda/bin)"
    assert graph.lines == before
    monkeypatch.setenv("METAPOOL_BUILD_CUDA", "1")
    with pytest.raises(script.SettingError, match="METAPOOL_BUILD_CUDA=1, but nvcc was not found"):
        script.add_cuda(graph, tmp_path / "library.so")


def test_an_nvcc_that_cannot_compile(script: ModuleType, tmp_path: Path) -> None:
    script.check_works(str(_fake_nvcc(tmp_path)))
    nvcc = _fake_nvcc(tmp_path, otherwise="echo 'unsupported GNU version!' >&2; exit 1")
    with pytest.raises(script.CannotBuildError, match="cannot compile: unsupported GNU version!"):
        script.check_works(str(nvcc))


def test_what_nvcc_is_told(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setenv("METAPOOL_BUILD_CUDA", "1")
    monkeypatch.setenv("METAPOOL_CUDA_ARCHS", "80;90+PTX")
    monkeypatch.setenv("METAPOOL_CXXFLAGS", "-fsanitize=address,undefined")
    graph = script.Graph("c++")
    objects, about = script.cuda_objects(graph, str(_fake_nvcc(tmp_path)))
    architectures = ["sm_80", "sm_90", "compute_90"]
    assert about | {"compiler": ""} == {
        "nvcc": "12.4.99",
        "compiler": "",
        "architectures": architectures,
    }
    graph.link(objects, tmp_path / "library.so", rule="link_cuda")
    compiling, linking = (line for line in graph.lines if "nvcc " in line and "command" in line)
    for code in architectures:
        assert f"-gencode=arch={code.replace('sm', 'compute')},code={code}" in compiling
    assert "sanitize" not in compiling
    assert r"-fsanitize=address\,undefined" in linking
    assert objects == ["csrc_cuda_kernel.cu.o"]
