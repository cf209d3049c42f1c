"""The arrows: which part of the project may know which."""

import ast
import re
import subprocess
import sys
from collections.abc import Container, Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metapool_kernels
from tests import rooms

ROOT = Path(__file__).parents[2]
PACKAGE = Path(metapool_kernels.__file__).parent
SEARCH = PACKAGE / "search"
TESTS = ROOT / "tests"

RANKS = (
    {"candidates", "spec", "version"},
    {"checks", "extra_candidates", "layout", "plain"},
    {"_triton", "convertible", "native", "reference"},
    {"dispatch"},
    {"ops"},
    {"autograd", "moments"},
    {"normalized"},
    {"functional"},
    {"nn"},
    {"__init__"},
    {"devices"},
    {"info", "search"},
)
"""Each module imports modules of earlier rows alone."""

ROOMS = (
    {"errors"},
    {"files"},
    {"settings"},
    {"machine", "method"},
    {"networks"},
    {"data"},
    {"run"},
    {"report", "training"},
    {"commands", "saved"},
    {"cli", "pooling_search"},
    {"__main__", "lightning", "transformers"},
)
"""The same for the rooms of the search."""

# The NumPy entry points stand beside the chain: over the compiled core, and below nothing.
BESIDE = {"numpy_api": {"candidates", "checks", "layout", "native"}}


def _parts(folder: Path) -> list[str]:
    files = [path.stem for path in folder.glob("*.py")]
    folders = [path.parent.name for path in folder.glob("*/__init__.py")]
    return sorted(files + folders)


def _sources(part: str, folder: Path) -> list[Path]:
    file = folder / f"{part}.py"
    return [file] if file.exists() else sorted((folder / part).rglob("*.py"))


def _imported(part: str, folder: Path = PACKAGE) -> set[str]:
    """Parts of the folder that one of them imports, anywhere in its code."""
    home = folder.relative_to(PACKAGE.parent).parts
    found = {
        _part_of(name.split(".")[len(home) :], folder)
        for source in _sources(part, folder)
        for name in _names(source)
        if tuple(name.split(".")[: len(home)]) == home
    }
    return found - {part}


def _names(source: Path) -> Iterator[str]:
    """What a file imports, with the names that it takes out of modules behind them."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from _named_late(node.args[0])


def _named_late(argument: ast.expr) -> Iterator[str]:
    """The module of ours that a call imports, or the folder where it chooses one."""
    start = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    if isinstance(start, ast.Constant) and isinstance(start.value, str):
        path = PACKAGE.parent / start.value.rstrip(".").replace(".", "/")
        if path.is_dir() or path.with_suffix(".py").exists():
            yield start.value.rstrip(".")


def _part_of(inner: list[str], folder: Path) -> str:
    return inner[0] if inner and inner[0] in _parts(folder) else "__init__"


def _rank(part: str, ranks: Sequence[set[str]]) -> int:
    found = [i for i, parts in enumerate(ranks) if part in parts]
    assert found, f"{part} has no place among the parts: give it one"
    return found[0]


@pytest.mark.parametrize("part", _parts(PACKAGE))
def test_imports_go_one_way(part: str) -> None:
    imported = _imported(part)
    if part in BESIDE:
        assert imported <= BESIDE[part]
        return
    beside = imported & BESIDE.keys()
    upward = {o for o in imported - beside if _rank(o, RANKS) >= _rank(part, RANKS)}
    assert not upward, f"{part} imports {upward}"
    assert not beside or part in RANKS[-1]


@pytest.mark.parametrize("room", [part for part in _parts(SEARCH) if part != "__init__"])
def test_imports_between_rooms_of_the_search_go_one_way(room: str) -> None:
    upward = {o for o in _imported(room, SEARCH) if _rank(o, ROOMS) >= _rank(room, ROOMS)}
    assert not upward, f"{room} imports {upward}"


def test_every_file_of_tests_lies_in_a_room() -> None:
    """In one of those that are listed, by which it is known what its tests need."""
    found = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert found == {*rooms.OF_THE_OP, *rooms.OF_MORE}


def test_no_file_imports_itself() -> None:
    """Not through others either, nor late, inside a function."""
    names = {_module(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in names.items():
        imported = {_longest(other, names) for other in _names(path)}
        graph[name] = imported - {name, None}
    TopologicalSorter(graph).prepare()  # which names the files of a circle, if there is one


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _longest(name: str, modules: Container[str]) -> str | None:
    """The module that a name stands for, or in which it stands."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_candidates_import_nothing_of_the_package() -> None:
    assert not _imported("candidates")


def test_the_search_is_imported_by_nobody() -> None:
    for part in _parts(PACKAGE):
        assert "search" not in _imported(part)


def test_import_is_light() -> None:
    """Nothing but our own modules, neither the search nor what only it or a GPU needs.

    `python -m benches.import_time` says how long that takes.
    """
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import metapool_kernels\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = {name for rank in RANKS[:-2] for name in rank} - {"__init__", "_triton"}
    ours = {PACKAGE.name} | {f"{PACKAGE.name}.{part}" for part in parts}
    assert set(done.stdout.split()) == ours


def _native_sources() -> list[Path]:
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]


def test_the_native_core_knows_no_framework() -> None:
    foreign = re.compile(
        r"#\s*include\s*[<\"](torch|ATen|c10|Python\.h|pybind11|numpy|\.\./\.\./python)"
    )
    sources = _native_sources()
    assert sources
    for source in sources:
        text = source.read_text()
        assert not foreign.search(text), f"{source} includes a framework's header"
        assert "python_bindings" not in text


def test_the_bindings_share_the_core_and_headers_alone() -> None:
    """No binding includes another one, and the NumPy module knows no torch."""
    includes = re.compile(r"#\s*include\s*[<\"]([^>\"]+)")
    folder = ROOT / "python_bindings"
    for source in (path for path in folder.iterdir() if path.suffix in (".h", ".cpp")):
        named = includes.findall(source.read_text())
        assert not [name for name in named if name.startswith("python_bindings")]
        assert not [name for name in named if name.endswith(".cpp")]
        if "numpy" in source.name:
            assert not [name for name in named if name.startswith(("torch", "ATen", "c10"))]


UNSAFE = {
    "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "np": {"load"},
    "numpy": {"load"},
    "jit": {"load"},
    "builtins": {"eval", "exec"},
}
"""Calls that execute what a file holds, or may: by module, and the functions."""


def _unsafe_calls(source: str) -> list[str]:
    """Calls in Python code that might execute the content of a file."""
    found = []
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        function = call.func
        if isinstance(function, ast.Name) and function.id in UNSAFE["builtins"]:
            found.append(function.id)
        if not isinstance(function, ast.Attribute):
            continue
        owner = ast.unparse(function.value).rpartition(".")[2]
        if function.attr in UNSAFE.get(owner, ()):
            found.append(f"{owner}.{function.attr}")
        if (owner, function.attr) == ("torch", "load"):
            safe = {k.arg for k in call.keywords if ast.unparse(k.value) == "True"}
            if "weights_only" not in safe:
                found.append("torch.load")
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)):
        names = {alias.name for alias in node.names}
        unsafe = UNSAFE.get(node.module or "", set()) | (
            {"load"} if node.module == "torch" else set()
        )
        found += [f"{node.module}.{name}" for name in names & unsafe]
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("pickle.load(f)", ["pickle.load"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("yaml.load(f)", ["yaml.load"]),
        ("yaml.safe_load(f)", []),
        ("np.load(f)", ["np.load"]),
        ("torch.jit.load(f)", ["jit.load"]),
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
    ],
)
def test_the_scan_finds_what_executes_files(source: str, found: list[str]) -> None:
    assert _unsafe_calls(source) == found


def test_no_file_is_executed() -> None:
    """Checkpoints are safetensors, or read with weights_only; settings are plain YAML and JSON."""
    sources = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "benches").rglob("*.py"))
    assert len(sources) > 50
    unsafe = {str(path): _unsafe_calls(path.read_text()) for path in sources}
    assert not {path: calls for path, calls in unsafe.items() if calls}
