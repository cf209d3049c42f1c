"""The files of a finished network: they run without this package and compute the same."""

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from metapool_kernels.search import export
from metapool_kernels.search.attention import CoordinateAttention
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.export import TOLERANCE, export_network
from metapool_kernels.search.run_folder import RunFolder

SHAPE = (3, 8, 8)
LOAD = """
import sys
sys.modules["metapool_kernels"] = None
import torch
program = torch.export.load(sys.argv[1])
images, expected = torch.load(sys.argv[2])
out = program.module()(images)
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
print(len(out), len([n for n in sys.modules if n.startswith("metapool")]))
"""


def network() -> nn.Module:
    """A mixture with every kind of candidate, one choice as it is derived, a bare mixture."""
    torch.manual_seed(0)
    mixture = SpatialEnhancer(
        4,
        ("skip_connect", "none", "max_pool_3x3", "avg_pool_5x5"),
        per_channel=True,
        count_include_pad=False,
        extra_candidates={"attention": CoordinateAttention(4)},
    )
    mixture.pool.alpha.data.normal_()  # type: ignore[operator, union-attr]
    single = SpatialEnhancer(4, ("max_pool_5x5",)).to_torch()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        mixture,
        single,
        MetaPool2d(("avg_pool_3x3", "max_pool_1x3"), stride=2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    model(torch.randn(64, *SHAPE))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, dict[str, float]]:
    model = network().train()
    folder = tmp_path_factory.mktemp("export")
    return folder, model, export_network(model, SHAPE, RunFolder(folder))


def test_exporting_leaves_two_files_and_the_network_as_it_was(
    exported: tuple[Path, nn.Module, dict[str, float]],
) -> None:
    folder, model, largest = exported
    assert {path.name for path in folder.iterdir()} == {"network.pt2", "network.onnx"} == {*largest}
    assert all(0 <= difference < TOLERANCE for difference in largest.values())
    assert model.training and isinstance(model[1], SpatialEnhancer)
    assert isinstance(model[3], MetaPool2d)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.costly), 7])
def test_the_program_runs_where_the_package_is_not(
    exported: tuple[Path, nn.Module, dict[str, float]], tmp_path: Path, batch: int
) -> None:
    folder, model, _ = exported
    images = torch.randn(batch, *SHAPE)
    with torch.no_grad():
        torch.save((images, model.eval()(images)), tmp_path / "expected")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "network.pt2"), str(tmp_path / "expected")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(batch), "1"]


@pytest.mark.parametrize("batch", [1, 7])
def test_the_onnx_file_computes_the_same(
    exported: tuple[Path, nn.Module, dict[str, float]], batch: int
) -> None:
    folder, model, _ = exported
    images = torch.randn(batch, *SHAPE)
    session = onnxruntime.InferenceSession(folder / "network.onnx")
    (out,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model.eval()(images)
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-5, atol=1e-5)


def test_exporting_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    export_network(model, SHAPE, RunFolder(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


class Op(nn.Module):
    """Calls the op itself, so no module can be turned into plain ones."""

    def forward(self, x: Tensor) -> Tensor:
        return fused_meta_pool(x, torch.zeros(7)).mean((2, 3))


class Fickle(nn.Module):
    """What cannot be traced: which way it goes depends on the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Op(), "calls 'metapool_kernels.meta_pool_fwd"), (Fickle(), "torch.export cannot take")],
)
def test_networks_that_cannot_be_exported_leave_no_file(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export_network(model, SHAPE, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shift", [1.0, float("nan")])
def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    honest = export.to_plain

    def wrong(model: nn.Module) -> nn.Module:
        plain = honest(model)
        plain[2].bias = nn.Parameter(plain[2].bias + shift)  # type: ignore[index, operator, union-attr]
        return plain

    monkeypatch.setattr(export, "to_plain", wrong)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(
        UserError, match=r"network.pt2 computes something else .* differ by (1|nan)"
    ):
        export_network(model, SHAPE, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf'{library}.*pip install "metapool_kernels\[export\]"'):
        export_network(nn.Identity(), SHAPE, RunFolder(tmp_path))
