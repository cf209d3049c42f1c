"""``architecture.json``: written and read again, and what is not taken."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metapool_kernels import MetaPool2d, NormalizedMetaPool2d
from metapool_kernels.convertible import to_plain
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.architecture import (
    Architecture,
    Layer,
    load_architecture,
    to_json,
)
from metapool_kernels.search.networks.attention import CoordinateAttention
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.networks.supernet import Supernet, build_supernet
from metapool_kernels.search.report.choices import choice_warnings, layer_table
from metapool_kernels.search.settings.config import ModelConfig

CANDIDATES = ["skip_connect", "max_pool_3x3", "avg_pool_3x3"]
BACKBONE = Backbone(
    "mobilenetv2_035",
    {"output_stride": 4, "num_classes": 10, "in_chans": 1},
    False,
    (1, 16, 16),
)


def layer(name: str, choice: list[str], weights: list[float]) -> Layer:
    return Layer(
        name=name,
        channels=48,
        map_size=(4, 4),
        choice=choice,
        weights=weights,
        alpha=[0.1, -0.25, 1.5],
        probability=0.6123456789012345,
        margin=0.3,
        epoch=5,
        reason="margin" if len(choice) == 1 else "deadline",
    )


@pytest.fixture
def architecture() -> Architecture:
    return Architecture(
        backbone=BACKBONE,
        insert_after=r"blocks\.1\.\d+\.bn2",
        candidates=CANDIDATES,
        count_include_pad=True,
        layers=[
            layer("blocks.1.0.bn2", ["avg_pool_3x3"], [1.0]),
            layer("blocks.1.1.bn2", ["max_pool_3x3", "skip_connect"], [0.7, 0.3]),
        ],
        seed=3,
        versions={"torch": "2"},
    )


def test_what_is_written_is_read(architecture: Architecture, tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(to_json(architecture))
    assert load_architecture(path) == architecture


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_file_that_is_cut_off_is_refused(
    architecture: Architecture, tmp_path: Path, part: float
) -> None:
    text = to_json(architecture).rstrip()
    path = tmp_path / "architecture.json"
    path.write_text(text[: int(len(text) * part)])
    with pytest.raises(UserError, match="not a complete JSON file"):
        load_architecture(path)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"format": "genotype"}, "not an architecture file"),
    ({"format_version": 2}, "format version 2; this metapool_kernels reads 1"),
    ({"format_version": None}, "format version None"),
    ({"candidates": ["max_pool_4x4"]}, "not valid"),
    ({"candidates": ["skip_connect"]}, "not from the candidates"),
    ({"extra_candidates": ["attention"]}, "unknown extra candidates"),
    ({"layers": [{}]}, "not valid"),
    ({"layers": 3}, "not valid"),
    ({"seed": "blue"}, "not valid"),
    ({"color": "blue"}, "not valid"),
    ({"backbone": None}, "not valid"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_other_files_are_refused(
    architecture: Architecture, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(json.loads(to_json(architecture)) | change))
    with pytest.raises(UserError, match=message):
        load_architecture(path)


@pytest.mark.parametrize("weights", [[], [0.5], [0.5, 0.4], [1.5, -0.5]])
def test_weights_that_are_no_mixture_are_refused(
    architecture: Architecture, tmp_path: Path, weights: list[float]
) -> None:
    architecture.layers[1].weights = weights
    path = tmp_path / "architecture.json"
    path.write_text(to_json(architecture))
    with pytest.raises(UserError, match="has weights"):
        load_architecture(path)


@pytest.mark.parametrize("text", ["[]", "3", '{"a": 1}'])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not an architecture file"):
        load_architecture(path)


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'metapool search'"):
        load_architecture(tmp_path / "architecture.json")


def test_choices_run_by_the_fused_op_and_become_plain_poolings(architecture: Architecture) -> None:
    model = derive(architecture, seed=0)
    single = model.get_submodule("blocks.1.0.bn2.enhancer").pool
    assert isinstance(single, MetaPool2d)
    assert single.candidates == ("avg_pool_3x3",) and single.weights().tolist() == [1]
    plain = to_plain(copy.deepcopy(model)).get_submodule("blocks.1.0.bn2.enhancer")
    assert [type(module) for module in plain[0]] == [torch.nn.ZeroPad2d, torch.nn.AvgPool2d]
    mixture = model.get_submodule("blocks.1.1.bn2.enhancer").pool
    assert isinstance(mixture, MetaPool2d)
    assert mixture.candidates == ("max_pool_3x3", "skip_connect")
    assert mixture.weights().tolist() == pytest.approx([0.7, 0.3])
    assert not mixture.alpha.requires_grad
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_the_derived_network_with_searched_weights_is_the_discretised_supernet(
    architecture: Architecture,
) -> None:
    config = ModelConfig(insert_after=architecture.insert_after, candidates=CANDIDATES)
    supernet = build_supernet(BACKBONE, config, seed=1)
    supernet.discretise("blocks.1.0.bn2", [2])
    supernet.discretise("blocks.1.1.bn2", [1, 0])
    weights = supernet.probabilities(["blocks.1.1.bn2"])["blocks.1.1.bn2"]
    architecture.layers[1].weights = weights
    derived = derive(architecture, 0, supernet.model.state_dict())
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(derived.eval()(x), supernet.model.eval()(x))


WITH_ATTENTION = [*CANDIDATES, "coordinate_attention"]


def supernet_with_attention(initial: dict[str, torch.Tensor] | None = None) -> Supernet:
    config = ModelConfig(
        insert_after=r"blocks\.1\.\d+\.bn2",
        insert_after_type="BatchNormAct2d",
        candidates=CANDIDATES,
        extra_candidates=["coordinate_attention"],
    )
    return build_supernet(BACKBONE, config, 1, initial)


def test_coordinate_attention_alone_and_in_a_mixture_goes_through_the_file(
    architecture: Architecture, tmp_path: Path
) -> None:
    supernet = supernet_with_attention()
    assert supernet.candidate_names == tuple(WITH_ATTENTION)
    first, second = (site.name for site in supernet.sites)
    assert supernet.alpha(second).shape == (4,)
    supernet.alpha(second).copy_(torch.tensor([0.0, 0.5, 0.0, 2.0]))
    supernet.discretise(first, [3])
    supernet.discretise(second, [3, 1])
    assert supernet.choice(first) == ["coordinate_attention"]
    assert supernet.choice(second) == ["coordinate_attention", "max_pool_3x3"]
    assert supernet.choice_weights(second) == pytest.approx(torch.tensor([1.5, 0]).softmax(0))
    assert supernet.probabilities([second])[second] == supernet.choice_weights(second)[::-1]

    for layer in architecture.layers:
        layer.choice = supernet.choice(layer.name)
        layer.weights = supernet.choice_weights(layer.name)
        layer.alpha = [0.0, 0.5, 0.0, 2.0]
    architecture.extra_candidates = ["coordinate_attention"]
    path = tmp_path / "architecture.json"
    path.write_text(to_json(architecture))
    read = load_architecture(path)
    assert read == architecture

    supernet.model.train()(torch.randn(4, 1, 16, 16))
    derived = derive(read, 0, supernet.model.state_dict())
    (alone,) = derived.get_submodule(f"{first}.enhancer").pool.extras.values()
    assert isinstance(alone, CoordinateAttention)
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(derived.eval()(x), supernet.model.eval()(x))
    scratch = derive(read, 0)
    assert derived.state_dict().keys() == scratch.state_dict().keys()
    for name, value in derive(read, 0).state_dict().items():
        assert torch.equal(value, scratch.state_dict()[name]), name
    assert "0.82 coordinate_attention + 0.18 max_pool_3x3" in layer_table(read)


def test_a_derived_mixture_takes_its_weights_from_the_architecture(
    architecture: Architecture,
) -> None:
    """Whatever the order in which the supernet has the two that it kept."""
    config = ModelConfig(insert_after=architecture.insert_after, candidates=CANDIDATES)
    supernet = build_supernet(BACKBONE, config, seed=1)
    supernet.alpha("blocks.1.1.bn2").copy_(torch.tensor([1.0, 0.0, 3.0]))
    supernet.discretise("blocks.1.0.bn2", [2])
    supernet.discretise("blocks.1.1.bn2", [0, 2])
    architecture.layers[1].choice = supernet.choice("blocks.1.1.bn2")
    architecture.layers[1].weights = supernet.choice_weights("blocks.1.1.bn2")
    assert architecture.layers[1].choice == ["avg_pool_3x3", "skip_connect"]
    derived = derive(architecture, 0, supernet.model.state_dict())
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(derived.eval()(x), supernet.model.eval()(x))


@pytest.mark.parametrize("keep", [[3, 1], [1, 3]])
def test_normalised_poolings_go_through_the_file_with_their_statistics(
    architecture: Architecture, tmp_path: Path, keep: list[int]
) -> None:
    """Whatever the order in which they were kept: a row of statistics goes with its pooling."""
    architecture.candidate_norm, architecture.count_include_pad = True, False
    architecture.candidates = ["none", "max_pool_3x3", "skip_connect", "avg_pool_3x3"]
    config = ModelConfig(
        insert_after=architecture.insert_after,
        candidates=architecture.candidates,
        count_include_pad=False,
        candidate_norm=True,
    )
    supernet = build_supernet(BACKBONE, config, seed=1)
    first, second = (site.name for site in supernet.sites)
    supernet.alpha(second).copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    supernet.discretise(first, [1])
    supernet.discretise(second, keep)
    for _ in range(3):
        supernet.model.train()(torch.randn(8, 1, 16, 16))
    x = torch.randn(4, 1, 16, 16)
    expected = supernet.model.eval()(x)
    for layer in architecture.layers:
        layer.choice = supernet.choice(layer.name)
        layer.weights = supernet.choice_weights(layer.name)
        layer.alpha = [0.0, 1.0, 0.0, 2.0]
        supernet.settle(layer.name)
    assert architecture.layers[1].choice == ["avg_pool_3x3", "max_pool_3x3"]
    torch.testing.assert_close(supernet.model(x), expected)
    path = tmp_path / "architecture.json"
    path.write_text(to_json(architecture))
    read = load_architecture(path)
    assert read == architecture

    derived = derive(read, 0, supernet.model.state_dict()).eval()
    pool = derived.get_submodule(f"{second}.enhancer").pool
    assert isinstance(pool, NormalizedMetaPool2d)
    assert pool.candidates == ("avg_pool_3x3", "max_pool_3x3") and not pool.count_include_pad
    kept = supernet.model.get_submodule(f"{second}.enhancer").pool
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(pool, name), getattr(kept, name)), name
    assert not torch.equal(pool.running_var[0], pool.running_var[1])
    torch.testing.assert_close(derived(x), expected)
    plain = to_plain(copy.deepcopy(derived))
    torch.testing.assert_close(plain(x), expected)


def test_two_equal_names_in_a_choice_keep_their_own_weights(architecture: Architecture) -> None:
    architecture.layers[1].choice = ["max_pool_3x3", "max_pool_3x3"]
    pool = derive(architecture, 0).get_submodule("blocks.1.1.bn2.enhancer").pool
    assert pool.weights().tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("field", ["extra_candidates", "candidate_norm"])
def test_a_file_from_before_a_field_is_read(
    architecture: Architecture, tmp_path: Path, field: str
) -> None:
    content = json.loads(to_json(architecture))
    del content[field]
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(content))
    assert load_architecture(path) == architecture


def test_the_weights_of_a_supernet_are_what_is_trained() -> None:
    supernet = supernet_with_attention()
    names = dict(supernet.model.named_parameters())
    alphas = {supernet.alpha_name(site.name) for site in supernet.sites}
    for site in supernet.sites:
        assert names[supernet.alpha_name(site.name)] is supernet.alpha(site.name)
        assert not supernet.alpha(site.name).requires_grad
    assert {id(p) for p in supernet.weights().values()} == {
        id(names[n]) for n in names.keys() - alphas
    }

    put = {name: names[name].detach().clone().requires_grad_() for name in alphas}
    out = torch.func.functional_call(supernet.model, put, (torch.randn(4, 1, 16, 16),))
    gradients = torch.autograd.grad(out.square().sum(), list(put.values()))
    assert all(gradient.any() for gradient in gradients)

    attention = [p for n, p in names.items() if n.startswith("blocks.1.0.bn2.enhancer.pool.extras")]
    before = len(supernet.weights())
    assert supernet.discretise("blocks.1.1.bn2", [3, 0]) == []
    dropped = supernet.discretise("blocks.1.0.bn2", [2])
    assert {id(p) for p in dropped} == {id(p) for p in attention}
    assert len(dropped) == 7 and len(supernet.weights()) == before - 7
    assert not supernet.alpha("blocks.1.0.bn2").requires_grad


def test_a_supernet_begins_with_what_it_is_given() -> None:
    given = supernet_with_attention().model.state_dict()
    for name, value in given.items():
        if not name.endswith("alpha"):
            value.add_(1)
    initial = {n: v.clone() for n, v in given.items() if not n.endswith("alpha")}
    model = supernet_with_attention(initial).model
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]), name
    name = "blocks.1.0.bn2.enhancer.norm.weight"
    for change, message in (
        ({n: v for n, v in initial.items() if n != name}, f"Missing key.*{name}"),
        ({**initial, "more": torch.zeros(1)}, "Unexpected key.*more"),
        ({**initial, name: torch.zeros(1)}, f"size mismatch for {name}"),
    ):
        with pytest.raises(UserError, match=f"(?s)initial weights do not fit.*{message}"):
            supernet_with_attention(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"insert_after": "nothing"}, "model.insert_after: 'nothing' matches no module"),
        ({"insert_after_type": "Conv2d"}, "none is a 'Conv2d'; they are BatchNormAct2d"),
        ({"candidates": ["max_pool_4x4"]}, "model.candidates: .*max_pool_4x4"),
        ({"extra_candidates": ["coordinate_attention"] * 2}, "model.candidates: .*each once"),
    ],
)
def test_a_supernet_that_cannot_be_is_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_supernet(BACKBONE, ModelConfig(**change), 0)


def test_images_that_are_too_small_are_named() -> None:
    backbone = Backbone("vgg11", {"num_classes": 3, "in_chans": 1}, True, (1, 4, 4))
    with pytest.raises(UserError, match=r"'vgg11' cannot take images of \(1, 4, 4\)"):
        build_supernet(backbone, ModelConfig(insert_after=r"features\.0"), 0)


def test_the_network_without_enhancers_begins_with_the_same_weights(
    architecture: Architecture,
) -> None:
    plain = BACKBONE.build(7).state_dict()
    derived = derive(architecture, 7).state_dict()
    for name, value in plain.items():
        twin = name.replace("bn2.", "bn2.host.") if name not in derived else name
        assert torch.equal(derived[twin], value), name


def test_a_layer_that_the_backbone_lacks_is_named(architecture: Architecture) -> None:
    architecture.layers[0].name = "blocks.9.0.bn2"
    with pytest.raises(UserError, match=r"no module 'blocks\.9\.0\.bn2'"):
        derive(architecture, 0)


def test_the_table_has_a_line_for_each_layer(architecture: Architecture) -> None:
    lines = layer_table(architecture).splitlines()
    assert lines[2].split() == [
        *("blocks.1.0.bn2", "4x4", "avg_pool_3x3", "0.612", "0.300", "5", "margin")
    ]
    assert "0.70 max_pool_3x3 + 0.30 skip_connect" in lines[3]


@pytest.mark.parametrize(("skipping", "warned"), [(6, False), (7, True)])
def test_over_sixty_percent_without_pooling_is_a_collapse(
    architecture: Architecture, skipping: int, warned: bool
) -> None:
    architecture.layers = [
        layer(str(i), ["skip_connect" if i < skipping else "avg_pool_3x3"], [1.0])
        for i in range(10)
    ]
    assert bool(choice_warnings(architecture)) is warned
