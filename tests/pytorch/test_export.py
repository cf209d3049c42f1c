"""torch.export and AOTInductor: what is exported computes the same, here and elsewhere."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer
from tests import cases
from tests.backends import needs_compiler
from tests.cases import Case
from tests.pytorch.test_compile import SIZES

ROOT = Path(__file__).parents[2]

LOAD = """
import sys
sys.path.insert(0, {root!r})
import torch
{imports}
torch.set_num_threads(1)
network = {load}
x, expected = torch.load({data!r}, weights_only=True)
for images, right in zip(x, expected):
    torch.testing.assert_close(network(images), right)
print("the same")
"""


def _network(backend: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), SpatialEnhancer(4, backend=backend)).eval()


def _dims() -> tuple[dict[int, object]]:
    sides = (torch.export.Dim(name, min=2, max=64) for name in "nhw")
    return (dict(zip((0, 2, 3), sides, strict=True)),)


def _images(layout: str, channels: int = 3) -> list[Tensor]:
    sizes = [(n, channels, h, w) for n, _, h, w in SIZES]
    return [Case(size, layout=layout).tensors()[0] for size in sizes]


def _targets(program: torch.export.ExportedProgram) -> list[str]:
    nodes = program.graph.nodes
    return [str(node.target) for node in nodes if "meta_pool" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_export_round_trip(backend: str, layout: str, strict: bool) -> None:
    module, images = SpatialEnhancer(4, backend=backend).eval(), _images(layout, 4)
    program = torch.export.export(module, (images[0],), dynamic_shapes=_dims(), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    lowered = loaded.run_decompositions()
    if backend != "reference":
        assert len(_targets(loaded)) == 1
        assert _targets(lowered) == [name.replace("_traced", "") for name in _targets(loaded)]
    for x in images:
        torch.testing.assert_close(loaded.module()(x), module(x))
        torch.testing.assert_close(lowered.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_module_learns_as_the_module_does(backend: str, strict: bool) -> None:
    """Gradients of first and second order, for x and alpha."""
    module = MetaPool2d(backend=backend, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(module, (x.detach(),), strict=strict).module()

    def gradients(call: nn.Module) -> list[Tensor]:
        (alpha,) = call.parameters()
        first = torch.autograd.grad(call(x).tanh().sum(), (x, alpha), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), (x, alpha))
        return [*first, *second]

    for got, right in zip(gradients(exported), gradients(module), strict=True):
        torch.testing.assert_close(got, right)


def _elsewhere(load: str, data: Path, *, imports: str) -> "subprocess.CompletedProcess[str]":
    """A process of its own in which nothing of this one is loaded."""
    code = LOAD.format(root=str(ROOT), imports=imports, load=load, data=str(data))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=data.parent, capture_output=True, text=True, check=False
    )


@pytest.fixture
def saved(native: str, tmp_path: Path) -> Path:
    """A folder with ``data.pt``: images, and what the network of :func:`_network` makes of them."""
    images = _images("contiguous")
    with torch.no_grad():
        expected = [_network(native)(x) for x in images]
    torch.save((images, expected), tmp_path / "data.pt")
    return tmp_path


def test_an_exported_network_runs_in_another_process(saved: Path, native: str) -> None:
    """Which has to import the package: without, the error names the op that is missing."""
    program = torch.export.export(
        _network(native), (_images("contiguous")[0],), dynamic_shapes=_dims()
    )
    torch.export.save(program, saved / "network.pt2")
    load = "torch.export.load('network.pt2').module()"
    done = _elsewhere(load, saved / "data.pt", imports="import metapool_kernels")
    assert done.stdout == "the same\n", done.stderr
    without = _elsewhere(load, saved / "data.pt", imports="")
    assert without.returncode == 1 and "torch.ops.metapool_kernels" in without.stderr


@pytest.mark.costly
@needs_compiler
def test_a_compiled_package_runs_here_and_in_another_process(saved: Path, native: str) -> None:
    """AOTInductor's C++ calls the op through the dispatcher, so the op has to be registered."""
    images = _images("contiguous")
    with torch.no_grad():
        program = torch.export.export(_network(native), (images[0],), dynamic_shapes=_dims())
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(saved / "package.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for x in images:
            out, expected = loaded(x), _network(native)(x)
            torch.testing.assert_close(out, expected)
            assert out.stride() == expected.stride()
    load = "torch._inductor.aoti_load_package('package.pt2')"
    # What torch 2.10 needs for loading, and forgets.
    forgotten = "import torch._inductor.codecache" if torch.__version__ < (2, 11) else ""
    done = _elsewhere(load, saved / "data.pt", imports=f"import metapool_kernels\n{forgotten}")
    assert done.stdout == "the same\n", done.stderr
    without = _elsewhere(load, saved / "data.pt", imports=forgotten)
    assert without.returncode == 1 and "metapool_kernels::meta_pool_fwd" in without.stderr
