"""Networks from timm, torchvision and one's own code, and the weights that they begin with."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.backbone import Backbone, make_backbone
from metapool_kernels.search.networks.supernet import Supernet, build_supernet
from metapool_kernels.search.networks.surgery import find_sites
from metapool_kernels.search.settings.config import ModelConfig

RGB = (3, 16, 16)
OWN = "own_networks:small"
SOURCE = """
from torch import nn

NUMBER = 3

def small(num_classes, in_chans, width=4):
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(width, num_classes),
    )

def nothing(num_classes, in_chans):
    return None

def broken(num_classes, in_chans):
    raise TypeError("a mistake inside")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's in it."""
    (tmp_path / "own_networks.py").write_text(SOURCE)
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


def build(name: str, shape: tuple[int, int, int] = RGB, **arguments: Any) -> nn.Module:
    config = ModelConfig(name=name, arguments=arguments)
    return make_backbone(config, shape, classes=7).build(seed=3)


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("mobilenetv2_035", {"output_stride": 4}, (1, 16, 16)),
        ("torchvision/shufflenet_v2_x0_5", {}, RGB),
        (OWN, {"width": 6}, (2, 16, 16)),
    ],
)
def test_networks_are_fitted_to_the_data_and_follow_the_seed(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(name, shape, **arguments)
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 7)
    for key, value in build(name, shape, **arguments).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_module_in_the_current_folder_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(folder)])
    assert isinstance(build(OWN)[0], nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mobilenetv9", {}, "timm cannot make model 'mobilenetv9'"),
        ("mobilenetv2_035", {"color": 1}, "timm cannot make .*color"),
        ("torchvision/mobilenet_v9", {}, "torchvision cannot make .*mobilenet_v9"),
        ("torchvision/resnet18", {"color": 1}, "torchvision cannot make .*color"),
        ("not_there:small", {}, "cannot import 'not_there'"),
        ("needs_more:small", {}, "cannot import 'needs_more': .*a_library_that_is_not_there"),
        ("own_networks:large", {}, "'own_networks' has no function 'large'"),
        ("own_networks:NUMBER", {}, "'own_networks' has no function 'NUMBER'"),
        (OWN, {"depth": 1}, "does not take .*depth"),
        ("own_networks:nothing", {}, "should return an nn.Module, got <class 'NoneType'>"),
    ],
)
def test_what_cannot_be_made_is_explained(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **arguments)


def test_a_mistake_inside_a_function_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="a mistake inside"):
        build("own_networks:broken")


def test_torchvision_takes_three_channels_alone() -> None:
    with pytest.raises(UserError, match=r"three channels only, these have 1; set data\.rgb"):
        build("torchvision/resnet18", (1, 16, 16))


@pytest.mark.parametrize("keep", [True, False])
def test_dilation_is_removed_on_request(keep: bool) -> None:
    arguments = {"output_stride": 4, "num_classes": 10, "in_chans": 1}
    model = Backbone("mobilenetv2_035", arguments, keep, (1, 32, 32)).build(0)
    dilated = [m for m in model.modules() if getattr(m, "dilation", (1, 1)) != (1, 1)]
    assert bool(dilated) is keep
    sites = find_sites(model, r"blocks\.[1-6]\.\d+\.bn2", torch.zeros(1, 1, 32, 32))
    assert {site.map_size for site in sites} == {(8, 8)}


def saved(change: dict[str, Tensor | None], classes: int = 7) -> str:
    """A file with the weights of :data:`OWN`, some of them changed or (None) left out."""
    weights: dict[str, Tensor | None] = dict(
        make_backbone(ModelConfig(name=OWN), RGB, classes).build(seed=99).state_dict()
    )
    weights |= change
    save_file({k: v.contiguous() for k, v in weights.items() if v is not None}, "weights")
    return "weights"


SUPERNET = {"name": OWN, "insert_after": "1", "candidates": ["skip_connect", "max_pool_3x3"]}


def supernet(**more: Any) -> Supernet:
    config = ModelConfig(**{**SUPERNET, **more})
    return build_supernet(make_backbone(config, RGB, classes=7), config, seed=3)


@pytest.mark.parametrize("classes", [7, 5])
def test_a_network_begins_with_the_weights_of_a_file(classes: int) -> None:
    model = supernet(weights=saved({}, classes)).model
    given = make_backbone(ModelConfig(name=OWN), RGB, classes).build(seed=99)
    drawn = supernet().model
    assert torch.equal(model[0].weight, given[0].weight)
    assert not torch.equal(model[0].weight, drawn[0].weight)
    assert torch.equal(model[4].weight, (given if classes == 7 else drawn)[4].weight)
    assert torch.equal(model[4].bias, (given if classes == 7 else drawn)[4].bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "it lacks 1 of the .*0.bias"),
        ({"9.bias": torch.zeros(3)}, "it has 1 that.*9.bias"),
        ({"0.weight": torch.zeros(4, 3, 5, 5)}, "size mismatch for 0.weight"),
        ({"0.weight": torch.zeros(5, 3, 3, 3)}, "size mismatch for 0.weight"),
        ({"4.weight": torch.zeros(5, 9), "4.bias": torch.zeros(5)}, "mismatch for 4.weight"),
    ],
    ids=["missing", "unknown", "other kernel", "other channels", "other classifier"],
)
def test_weights_of_another_network_are_refused(
    change: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?s)does not fit.*without enhancers.*{message}"):
        supernet(weights=saved(change))


def test_weights_under_other_names_are_told_on_a_short_line() -> None:
    loaded = build(OWN).state_dict()
    save_file({f"module.{name}": value.contiguous() for name, value in loaded.items()}, "weights")
    with pytest.raises(UserError, match=f"lacks {len(loaded)} of.*; it has.*'module.") as caught:
        supernet(weights="weights")
    assert len(str(caught.value)) < 300


def test_only_one_module_may_have_another_number_of_classes() -> None:
    """A convolution of as many channels as there are classes is no second classifier."""
    wide = {"width": 7}
    given = {
        name: torch.zeros(5, *value.shape[1:])
        for name, value in build(OWN, **wide).state_dict().items()
    }
    save_file(given, "weights")
    with pytest.raises(UserError, match=r"(?s)does not fit.*0\.weight.*4\.weight"):
        supernet(arguments=wide, weights="weights")


def test_weights_that_cannot_be_read_are_refused(folder: Path) -> None:
    (folder / "damaged").write_bytes(b"nothing of use")
    for name in ("damaged", "missing"):
        with pytest.raises(UserError, match=f"model.weights: cannot read '{name}'"):
            supernet(weights=name)
    torch.save({}, folder / "pickled")
    with pytest.raises(UserError, match=r"no whole safetensors file .*save_file writes such"):
        supernet(weights="pickled")
