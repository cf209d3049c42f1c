"""How the kernels are built, and what is said where they are not."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from metapool_kernels import MetaPool2d, dispatch, fused_meta_pool, info, native
from tests import setup_script

ROOT = Path(__file__).parents[2]
PACKAGE = Path(native.__file__).parent
LIBRARY = PACKAGE / "_torch_ops_cuda.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=str(native.CUDA_OPS_PROBLEM))


@pytest.fixture
def script() -> ModuleType:
    """setup.py as a module."""
    return setup_script.load()


@pytest.mark.parametrize(
    "machine, text, names",
    [
        ("x86_64", "", ["avx2", "avx512"]),
        ("AMD64", "avx512, avx2", ["avx2", "avx512"]),
        ("x86_64", "avx2", ["avx2"]),
        ("x86_64", "baseline;", []),
        ("x86_64", "baseline;avx512", ["avx512"]),
        ("aarch64", "", []),
        ("aarch64", "baseline", []),
    ],
)
def test_instruction_sets(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: str, text: str, names: list[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("METAPOOL_ISAS", text)
    graph = script.Graph("c++")
    objects, isas = script.kernel_objects(graph)
    assert isas == ["baseline", *names]
    assert objects[1:] == [f"csrc_cpu_isa_{name}.cpp.o" for name in isas]
    defines = [line for line in graph.lines if "METAPOOL_HAS" in line]
    for name in ("avx2", "avx512"):
        assert all(
            (f"-DMETAPOOL_HAS_{name.upper()}" in line) == (name in names) for line in defines
        )
    assert len(defines) == (len(objects) - 1 if names else 0)  # the baseline needs none


@pytest.mark.parametrize("machine, text", [("x86_64", "avx2;sse9"), ("aarch64", "avx2")])
def test_a_wrong_instruction_set_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: str, text: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(script.SettingError, match="METAPOOL_ISAS should be some of") as raised:
        script.instruction_sets(text)
    assert repr(text.split(";")[-1]) in str(raised.value)


def test_the_build_is_written_down() -> None:
    """Either how the CUDA kernels were built, or why they were not."""
    facts = native.build_facts()
    if not facts:
        pytest.skip("setup.py did not run")
    about = facts["cuda"]
    assert about.keys() in ({"skipped"}, about.keys() | {"nvcc", "architectures", "compiler"})
    assert LIBRARY.exists() == ("skipped" not in about)
    row = next(line for line in info.report().splitlines() if line.startswith("  cuda "))
    assert (about.get("skipped") or "/".join(about["architectures"])) in row


def test_info_says_why_no_gpu_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = info.report().splitlines()
    assert [row for row in rows if row.startswith("  gpu ") and "none is usable: torch" in row]
    assert [row for row in rows if row.startswith("  cuda ") and "no GPU is usable" in row]


class _OnGpu:
    """As much of a tensor as the predicates look at."""

    device = torch.device("cuda", 3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the compute capability of a GPU and the code that was compiled."""

    def be(capability: tuple[int, int], architectures: list[str]) -> None:
        dispatch._find_gpu_problem.cache_clear()

        def facts() -> dict[str, Any]:
            torch._dynamo.graph_break()  # as reading a file is one
            return {"cuda": {"architectures": architectures}}

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(native, "CUDA_OPS_PROBLEM", None)
        monkeypatch.setattr(native, "build_facts", facts)

    yield be
    dispatch._find_gpu_problem.cache_clear()


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["compute_80"], True),
        ((8, 0), ["compute_90"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((10, 0), ["sm_100"], True),
    ],
)
def test_code_for_a_gpu(
    gpu: Any, capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    gpu(capability, architectures)
    reason = dispatch._refuse_cuda(_OnGpu)  # type: ignore[arg-type]
    if runs:
        assert reason is None
        return
    number = "".join(map(str, capability))
    assert reason is not None
    assert f"{', '.join(architectures)} and cuda:3 is sm_{number}" in reason
    assert f"METAPOOL_CUDA_ARCHS={number}" in reason


def test_an_old_gpu_is_refused(gpu: Any) -> None:
    gpu((7, 0), ["compute_70"])
    oldest = {dispatch._refuse_cuda: (7, 5), dispatch._refuse_triton: (8, 0)}
    for refuse, needed in oldest.items():
        reason = refuse(_OnGpu)  # type: ignore[arg-type]
        if reason is None or "Triton" not in reason:
            assert reason == f"cuda:3 has compute capability (7, 0), {needed} is needed"


def test_turing_has_the_cuda_kernels_alone(gpu: Any) -> None:
    gpu((7, 5), ["sm_75"])
    assert dispatch._refuse_cuda(_OnGpu) is None  # type: ignore[arg-type]
    assert dispatch._refuse_triton(_OnGpu) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git", True), ("2.9", False)]
)
def test_an_old_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, runs: bool
) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: version)
    problem = dispatch._triton_problem.__wrapped__()
    assert problem is None if runs else f"Triton {version} is too old" in problem


@pytest.mark.parametrize("name", ["triton", "triton-rocm", "pytorch-triton-rocm", "tritonic"])
def test_triton_has_several_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def version(asked: str) -> str:
        if asked == name:
            return "3.6.0"
        raise dispatch.importlib.metadata.PackageNotFoundError(asked)

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch.importlib.metadata, "version", version)
    problem = dispatch._triton_problem.__wrapped__()
    assert (problem is None) == ("-rocm" in name or name == "triton")


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_what_amd_gpus_run(gpu: Any, monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    """Kernels that have only been compiled for them, for who asks for that."""
    gpu((9, 4), ["sm_90"])
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: None)
    if asked is None:
        monkeypatch.delenv("METAPOOL_ROCM", raising=False)
    else:
        monkeypatch.setenv("METAPOOL_ROCM", asked)
    assert "for NVIDIA GPUs" in str(dispatch._refuse_cuda(_OnGpu))  # type: ignore[arg-type]
    chosen = dispatch.choose_backend(None, _OnGpu)  # type: ignore[arg-type]
    assert chosen == ("triton" if asked == "1" else "reference")
    if asked != "1":
        with pytest.raises(
            RuntimeError, match=r"nobody has run them there yet; set METAPOOL_ROCM=1"
        ):
            dispatch.choose_backend("triton", _OnGpu)  # type: ignore[arg-type]


def test_asking_for_the_gpu_breaks_no_graph(gpu: Any) -> None:
    gpu((8, 0), ["sm_80"])

    def chosen(x: torch.Tensor) -> torch.Tensor:
        problem = dispatch._gpu_problem("cuda", torch.device("cuda", 3))
        return x + 1 if problem is None else x - 1

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_why_cuda_is_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((8, 0), ["sm_80"])
    on_cpu = "it takes tensors on a GPU and x is on cpu; move x with x.cuda()"
    monkeypatch.setattr(native, "CUDA_OPS_PROBLEM", "the CUDA kernels are missing")
    assert dispatch._refuse_cuda(torch.empty(1)) == on_cpu
    assert dispatch._refuse_cuda(_OnGpu) == "the CUDA kernels are missing"  # type: ignore[arg-type]
    assert dispatch._refuse_cuda(torch.empty(1, device="meta")) is None


def test_shapes_need_no_kernel() -> None:
    x = torch.empty(2, 3, 9, 8, device="meta")
    names = ("max_pool_3x3", "avg_pool_5x5")
    out = fused_meta_pool(x, torch.empty(2, device="meta"), names, stride=2, backend="cuda")
    assert out.shape == (2, 3, 5, 4)


@needs_library
def test_import_without_a_driver() -> None:
    """A GPU that is hidden is as good as a driver that is not there."""
    code = (
        "from metapool_kernels import native, info\n"
        "assert native.CUDA_OPS_PROBLEM is None, native.CUDA_OPS_PROBLEM\n"
        "print(info.report())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU is usable" in done.stdout


def _said(code: str, folder: Path) -> str:
    """What code prints where the package of ``folder`` is imported.

    Without site: an editable installation finds its compiled module for every copy.
    """
    paths = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _copy(folder: Path, *without: str) -> Path:
    """A copy of the package in ``folder``."""
    ignored = shutil.ignore_patterns("__pycache__", *without)
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored))


def test_a_package_that_was_never_built(tmp_path: Path) -> None:
    """It imports, and says why there are no kernels."""
    package = _copy(tmp_path, "*.so", "_build.json")
    facts = {"cuda": {"skipped": "no nvcc today"}}
    (package / "_build.json").write_text(json.dumps(facts))
    said = _said(
        "from metapool_kernels import native as n; print(n.CUDA_OPS_PROBLEM, n.TORCH_OPS_PROBLEM)",
        tmp_path,
    )
    assert "the CUDA kernels are missing (no nvcc today)" in said
    assert "the compiled kernels are missing (never built)" in said


@pytest.mark.parametrize(
    "python, reason",
    [
        (platform.python_version(), "built, but the file is gone"),
        ("2.7.18", f"built for Python 2.7.18, this is {platform.python_version()}"),
    ],
)
def test_a_lost_numpy_module(tmp_path: Path, python: str, reason: str) -> None:
    """As after a change of Python: the rest works, and info tells what happened."""
    package = _copy(tmp_path, "*.so")
    (package / "_build.json").write_text(json.dumps({"numpy_ops": {"python": python}}))
    said = _said("from metapool_kernels import info; print(info.report())", tmp_path)
    assert f"unknown: the compiled NumPy module is missing ({reason}); mend that" in said


def test_without_numpy(tmp_path: Path) -> None:
    """The op and the report work; the NumPy entry points name what they lack."""
    _copy(tmp_path)
    said = _said(
        "import sys; sys.modules['numpy'] = None\n"
        "import torch; from metapool_kernels import fused_meta_pool, info\n"
        "print(fused_meta_pool(torch.ones(1, 1, 2, 2), torch.zeros(7)).sum(), info.report())\n"
        "try: from metapool_kernels import numpy_api\n"
        "except ModuleNotFoundError as error: print('missing:', error)",
        tmp_path,
    )
    assert "missing: import of numpy halted" in said
    assert "tensor(" in said
    if native.TORCH_OPS_PROBLEM is None:
        assert re.search("instruction set +(?!unknown)", said)


CALLS = {
    "called": "use(x)",
    "compiled": "torch._dynamo.config.error_on_recompile = True; "
    "torch.compile(use, fullgraph=True, backend='eager')(x)",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_fallback_is_told_once(tmp_path: Path, call: str) -> None:
    """In a process, with the reason, the way to mend it and the line; a graph stays whole."""
    _copy(tmp_path, "*.so", "_build.json")
    code = (
        "import warnings, torch\n"
        "from metapool_kernels import fused_meta_pool\n"
        "def use(x, **forced): return fused_meta_pool(x, torch.zeros(7), **forced)\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    use(x, backend='reference')\n"
        "    print(len(told), 'before')\n"
        f"    for _ in range(2): {CALLS[call]}\n"
        "    use(x)\n"
        "for one in told: print(one.category.__name__, one.filename, one.message)\n"
    )
    before, *lines = _said(code, tmp_path).splitlines()
    assert before == "0 before"
    (line,) = lines
    assert line.startswith("RuntimeWarning <string> fused_meta_pool runs in plain PyTorch on cpu")
    assert "cpu: the compiled kernels are missing (never built); mend that" in line
    assert "`python -m metapool_kernels.info`" in line


def _told(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[str]:
    """What a call warns of in a process that has not warned yet."""
    monkeypatch.setattr(dispatch, "_has_warned", False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    return [f"{Path(one.filename).name}: {one.message}" for one in told if "plain" in str(one)]


def _pool(x: torch.Tensor) -> torch.Tensor:
    return fused_meta_pool(x, torch.zeros(7, device=x.device))


def _in_fake_mode() -> None:
    with FakeTensorMode():
        _pool(torch.empty(1, 1, 2, 2))


SMALL = torch.ones(1, 1, 2, 2)


@pytest.mark.parametrize(
    "call, tells",
    [
        pytest.param(lambda: torch.nn.Sequential(MetaPool2d())(SMALL), True, id="module"),
        pytest.param(
            lambda: vmap(grad(lambda x: _pool(x).sum()))(SMALL[None]), True, id="transforms"
        ),
        pytest.param(lambda: MetaPool2d(backend="reference")(SMALL), False, id="forced"),
        pytest.param(lambda: torch.export.export(MetaPool2d(), (SMALL,)), False, id="exported"),
        pytest.param(_in_fake_mode, False, id="fake"),
        pytest.param(lambda: _pool(SMALL.to("meta")), False, id="meta"),
    ],
)
def test_who_is_told_of_a_fallback(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], tells: bool
) -> None:
    """The user's own line, where there are numbers and a choice."""
    monkeypatch.setattr(native, "TORCH_OPS_PROBLEM", "they are gone")
    told = _told(monkeypatch, call)
    assert len(told) == tells
    assert all(one.startswith("test_build.py: ") and "cpu: they are gone." in one for one in told)


@pytest.mark.usefixtures("native")
def test_kernels_are_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, lambda: _pool(SMALL)) == []


def test_a_fallback_on_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD's nobody misses any who does not ask for them, and on other devices neither."""
    gpu((9, 0), ["sm_80"])
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: "Triton is gone")

    def choose(x: type) -> list[str]:
        return _told(monkeypatch, lambda: dispatch.choose_backend(None, x))  # type: ignore[arg-type]

    (told,) = choose(_OnGpu)
    assert "on cuda, many" in told
    assert "triton: Triton is gone. cuda: the CUDA kernels were compiled for sm_80" in told
    assert choose(type("OnMps", (), {"device": torch.device("mps")})) == []
    monkeypatch.setattr(torch.version, "hip", "7.0")
    dispatch._find_gpu_problem.cache_clear()
    assert choose(_OnGpu) == []
    monkeypatch.setenv("METAPOOL_ROCM", "1")
    dispatch._find_gpu_problem.cache_clear()
    (told,) = choose(_OnGpu)
    assert "triton: Triton is gone. cuda: the kernels in CUDA are for NVIDIA GPUs." in told
