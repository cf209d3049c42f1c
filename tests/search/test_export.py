"""The files of a finished network: they run without this package and compute the same."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from metapool_kernels.devices.targets.onnx_int8 import OnnxInt8
from metapool_kernels.plain import FORM
from metapool_kernels.search.commands import export
from metapool_kernels.search.commands.export import TOLERANCE, export_network
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.attention import CoordinateAttention
from metapool_kernels.search.run.run_folder import RunFolder

SHAPE = (3, 8, 8)
Found = dict[str, dict[str, Any]]
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


FILES = ("network.pt2", "network.onnx")


def network() -> nn.Module:
    """A mixture of every kind of candidate, one choice as derived, a bare one, normalised."""
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
    normalised = SpatialEnhancer(
        4, ("none", "max_pool_3x3", "avg_pool_5x5", "skip_connect"), candidate_norm=True
    )
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        mixture,
        single,
        MetaPool2d(("avg_pool_3x3", "max_pool_1x3"), stride=2),
        normalised,
        SpatialEnhancer(4, ("avg_pool_3x3",), candidate_norm=True),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    model(torch.randn(64, *SHAPE))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Found]:
    model = network().train()
    folder = tmp_path_factory.mktemp("export")
    return folder, model, export_network(model, SHAPE, RunFolder(folder))


def test_exporting_leaves_two_files_and_the_network_as_it_was(
    exported: tuple[Path, nn.Module, Found],
) -> None:
    folder, model, found = exported
    assert {path.name for path in folder.iterdir()} == {*FILES, "targets.json"}
    assert found == json.loads((folder / "targets.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    assert found["torch"]["files"] | found["onnx"]["files"] == sizes
    assert all(0 <= entry["difference"] < TOLERANCE for entry in found.values())
    times = found["onnx"]["seconds"]["searched"]
    assert 0 < times["lower"] <= times["median"] <= times["upper"]
    assert model.training and isinstance(model[1], SpatialEnhancer)
    assert isinstance(model[3], MetaPool2d)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.costly), 7])
def test_the_program_runs_where_the_package_is_not(
    exported: tuple[Path, nn.Module, Found], tmp_path: Path, batch: int
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
    exported: tuple[Path, nn.Module, Found], batch: int
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


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))


@pytest.mark.parametrize(
    ("file", "shift"),
    [
        ("network.pt2", 1.0),
        ("network.pt2", float("nan")),
        ("network.onnx", 1.0),
        pytest.param("network.onnx", float("nan"), marks=pytest.mark.costly),
    ],
)
def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, shift: float
) -> None:
    model, shifted = small(), small()
    shifted.load_state_dict(model.state_dict())
    shifted[2].bias = nn.Parameter(shifted[2].bias + shift)  # type: ignore[operator]
    wrong = export.trace(shifted, SHAPE, FORM)
    honest = export.run_target
    if file == "network.pt2":
        monkeypatch.setattr(export, "trace", lambda *_: wrong)
    else:

        def run(name: str, programs: Found, **options: Any) -> Any:
            return honest(name, dict.fromkeys(programs, wrong), **options)

        monkeypatch.setattr(export, "run_target", run)
    with pytest.raises(UserError, match=rf"{file} computes something else .* differ by (1|inf)"):
        export_network(model, SHAPE, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf'{library}.*pip install "metapool_kernels\[export\]"'):
        export_network(nn.Identity(), SHAPE, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_one_target_cannot_do_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", None)
    found = export_network(small(), SHAPE, RunFolder(tmp_path), targets=["ncnn", "onnx"])
    assert 'pip install "metapool_kernels[ncnn]"' in found["ncnn"]["reason"]
    assert found["onnx"]["files"].keys() == {"network.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "targets.json"}


@pytest.fixture(scope="module")
def in_integers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found, list[Any]]:
    folder = tmp_path_factory.mktemp("integers")
    model, images = small(), torch.randn(130, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
    clear = logits.diff(dim=1).abs().flatten().topk(10).indices
    targets = logits.argmax(1)[clear]
    targets[0] = 1 - targets[0]
    given = export.Images(images, images[clear], targets)
    forms = []
    honest = export.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", lambda *these: forms.append(these[-1]) or honest(*these))
        found = export_network(
            model, SHAPE, RunFolder(folder), targets=["onnx", "onnx_int8"], images=lambda: given
        )
    return folder, found, forms


def test_a_file_of_integers_is_judged_by_its_accuracy(
    in_integers: tuple[Path, Found, list[Any]],
) -> None:
    folder, found, _ = in_integers
    assert found["onnx_int8"]["accuracy"] == {"file": 90.0, "float32": 90.0, "images": 10}
    assert 1e-4 < found["onnx_int8"]["difference"] < 0.2
    quantized = onnx.load(folder / "network.int8.onnx")
    assert [node.op_type for node in quantized.graph.node].count("QuantizeLinear") >= 3
    assert found["onnx_int8"]["files"].keys() == {"network.int8.onnx"}
    assert "accuracy 90.00%, in float32 90.00% (10 images)" in export._table(found)
    assert "accuracy" not in found["onnx"]


def test_targets_of_one_form_share_a_trace(in_integers: tuple[Path, Found, list[Any]]) -> None:
    assert in_integers[2] == [FORM, OnnxInt8.form]


def test_images_that_are_gone_stop_no_other_target(tmp_path: Path) -> None:
    def gone() -> export.Images:
        raise UserError("the images have changed since")

    found = export_network(
        small(), SHAPE, RunFolder(tmp_path), targets=["onnx_int8", "onnx"], images=gone
    )
    assert found["onnx_int8"] == {"reason": "the images have changed since"}
    assert found["onnx"]["files"]


def test_integers_need_images(tmp_path: Path) -> None:
    found = export_network(small(), SHAPE, RunFolder(tmp_path), targets=["onnx_int8", "onnx"])
    assert "none are given" in found["onnx_int8"]["reason"]
    assert found["onnx"]["files"]


def test_files_tell_nothing_of_where_they_were_made(
    exported: tuple[Path, nn.Module, Found], in_integers: tuple[Path, Found, list[Any]]
) -> None:
    folder, _, _ = exported
    for path in (*(folder / name for name in FILES), in_integers[0] / "network.int8.onnx"):
        content, name = path.read_bytes(), path.name
        for word in (str(Path.cwd()), str(Path(torch.__file__).parent), ".py"):
            assert word.encode() not in content, f"{name} has {word!r} in it"
    assert b"metapool" not in (folder / "network.onnx").read_bytes()
    assert torch.export.load(folder / "network.pt2").example_inputs is None


def test_a_batch_is_called_so_and_nothing_else_has_a_name(
    exported: tuple[Path, nn.Module, Found], in_integers: tuple[Path, Found, list[Any]]
) -> None:
    """Whoever fixes it in the file, as tract wants it, changes one word in two places."""
    for path in (exported[0] / "network.onnx", in_integers[0] / "network.int8.onnx"):
        graph = onnx.load(path).graph
        for value in (*graph.input, *graph.output):
            named = [size.dim_param for size in value.type.tensor_type.shape.dim if size.dim_param]
            assert named == ["batch"]
        assert not graph.value_info


def test_exported_operators_are_those_that_runtimes_take_fast(
    exported: tuple[Path, nn.Module, Found],
) -> None:
    """No stack of five dimensions, no BatchNorm behind a pooling, no shapes that are computed."""
    folder, _, _ = exported
    nodes = onnx.load(folder / "network.onnx").graph.node
    operators = {node.op_type for node in nodes}
    slow = {"Concat", "ReduceSum", "Unsqueeze", "BatchNormalization", "Range", "Gather", "Shape"}
    # Coordinate attention has one of its own, behind a convolution of two strips in turn.
    assert operators & slow <= {"BatchNormalization"}
    assert [node.op_type for node in nodes].count("BatchNormalization") <= 2
    for node in nodes:
        if node.op_type == "MaxPool":
            height, width = next(a.ints for a in node.attribute if a.name == "kernel_shape")
            assert 1 in (height, width) or height * width < 25


class Standardized(nn.Module):
    """Divides each image by its deviation, which is nothing where all of it is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / x.std((1, 2, 3), keepdim=True)).mean((2, 3))


def test_odd_images_of_which_a_network_makes_no_numbers_are_left_out() -> None:
    cases = export.make_cases(Standardized(), SHAPE)
    assert "zeros" not in cases.images and {"large", "ties"} <= cases.images.keys()
    assert cases.images.keys() == cases.expected.keys() == cases.allowed.keys()
    with pytest.raises(UserError, match="NaN or Inf for random images"):
        export.make_cases(nn.Threshold(torch.inf, torch.nan), SHAPE)


def test_what_float32_loses_is_allowed() -> None:
    """A sum of a thousand that cancel: no float32 is nearer than that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    lossy = copy.deepcopy(model)
    lossy[2].bias = nn.Parameter(lossy[2].bias + 2e4)  # type: ignore[index, operator, union-attr]
    lossy.append(Minus(2e4))
    exact, rough = export.make_cases(model, SHAPE), export.make_cases(lossy, SHAPE)
    case = "zeros"
    rounding = (lossy(rough.images[case]) - rough.expected[case]).abs().max().item()
    assert rough.allowed[case] > 5 * rounding > 5 * exact.allowed[case]


class Minus(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x - self.number
