"""The planted problem: what it hides, that it hides it well, and that it can be found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels.search.cli import main
from metapool_kernels.search.data.planted import (
    BANDS,
    CLASSES,
    load_planted,
    planted_windows,
    teacher_state,
    texture_net,
    textures,
)
from metapool_kernels.search.data.splits import Data, split_data, split_warnings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.backbone import make_backbone
from metapool_kernels.search.networks.norms import measure_norms
from metapool_kernels.search.networks.supernet import Supernet, build_supernet
from metapool_kernels.search.settings.config import Config, ModelConfig, PlantedConfig
from metapool_kernels.search.settings.config_file import config_parser, load_config, to_config
from tests.search.runs import REPOSITORY

pytestmark = pytest.mark.usefixtures("quick_pictures")

CONFIG = REPOSITORY / "configs" / "planted.yaml"


def settings(*arguments: str, **planted: Any) -> Config:
    """``configs/planted.yaml`` with fewer images, and changes."""
    parser = config_parser()
    parser.add_argument("--config", action="config")
    parsed = parser.parse_args([f"--config={CONFIG}", "--data.planted.images=512", *arguments])
    config = to_config(parser.instantiate(parsed))
    return replace(config, data=replace(config.data, planted=_with(config, planted)))


def _with(config: Config, planted: dict[str, Any]) -> PlantedConfig:
    return replace(config.data.planted, **planted)


def supernet(config: Config, data: Data) -> Supernet:
    """As a search begins with it."""
    backbone = make_backbone(config.model, data.image_shape, len(data.classes))
    return build_supernet(backbone, config.model, config.seed)


def student(config: Config, data: Data, state: dict[str, Tensor], windows: list[str]) -> nn.Module:
    """The supernet with the tensors ``state``, and one window in each layer."""
    net = supernet(config, data)
    missing, unknown = net.model.load_state_dict(state, strict=False)
    assert unknown == []
    assert missing == [f"{site.name}.enhancer.pool.alpha" for site in net.sites]
    for site, window in zip(net.sites, windows, strict=True):
        net.discretise(site.name, [config.model.candidates.index(window)])
    return net.model.eval()


def answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits.argmax(1)


def test_pooling_alone_mixes_pixels() -> None:
    model = texture_net(CLASSES, BANDS).eval()
    images = torch.randn(4, BANDS, 6, 6)
    shuffled = images.flatten(2)[..., torch.randperm(36)].view_as(images)
    torch.testing.assert_close(model(images), model(shuffled))
    config = ModelConfig(insert_after=r"blocks\.4\.act", candidates=["avg_pool_3x3"])
    backbone = make_backbone(replace(config, name=settings().model.name), (BANDS, 6, 6), CLASSES)
    pooled = build_supernet(backbone, config, 0).model.eval()
    assert (pooled(images) - pooled(shuffled)).abs().max() > 1e-3


def test_block_i_takes_in_band_i() -> None:
    """What the first band holds passes every pooling, what the last one holds only the last."""
    model = texture_net(CLASSES, BANDS, depth=BANDS).eval()
    images = torch.randn(1, BANDS, 4, 4)
    for band in range(BANDS):
        seen = []
        hooks = [
            block.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
            for block in model.blocks
        ]
        changed = images.clone()
        changed[:, band] += 1
        model(images)
        model(changed)
        for hook in hooks:
            hook.remove()
        same = [torch.equal(a, b) for a, b in zip(seen[:BANDS], seen[BANDS:], strict=True)]
        assert same == [True] * band + [False] * (BANDS - band)


def test_textures_depend_on_the_generator_alone() -> None:
    first, again, other = (textures(3, 12, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (3, BANDS, 12, 12)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1


def test_the_teacher_labels_every_image() -> None:
    config = settings()
    data = load_planted(config)
    windows = planted_windows(config)
    model = student(config, data, teacher_state(config), windows)
    for dataset, targets in (
        (data.train_set, data.train_targets),
        (data.evaluation_set, data.evaluation_targets),
    ):
        images, labels = dataset.tensors
        assert labels.tolist() == targets
        assert torch.equal(answers(model, images), labels)
    assert (len(data.train), len(data.evaluation)) == (512, 128)


def test_every_class_is_there_and_none_is_most() -> None:
    data = load_planted(settings())
    counts = torch.bincount(torch.tensor(data.train_targets), minlength=CLASSES)
    assert counts.min() >= 10 and counts.max() < 200
    assert split_warnings(data, split_data(data, 0.5, 0)) == []


def test_every_layer_matters() -> None:
    """Any other window, in any one layer, changes answers."""
    config = settings()
    data = load_planted(config)
    windows = planted_windows(config)
    state = teacher_state(config)
    images, labels = data.train_set.tensors
    for layer, truth in enumerate(windows):
        for candidate in set(config.model.candidates) - {truth}:
            changed = [*windows[:layer], candidate, *windows[layer + 1 :]]
            other = answers(student(config, data, state, changed), images)
            assert (other != labels).float().mean() > 0.02, (layer, truth, candidate)


def test_the_search_begins_blind() -> None:
    config = settings()
    begins = supernet(config, load_planted(config)).model.state_dict()
    for name, tensor in teacher_state(config).items():
        if tensor.is_floating_point():
            assert not torch.equal(begins[name], tensor), name


def test_windows_are_drawn_with_the_seed() -> None:
    drawn = [tuple(planted_windows(settings(f"--seed={seed}"))) for seed in range(8)]
    assert len(set(drawn)) == 8
    assert {name for windows in drawn for name in windows} == set(settings().model.candidates)
    assert tuple(planted_windows(settings("--seed=3"))) == drawn[3]


def test_windows_can_be_given() -> None:
    windows = ["skip_connect", *["avg_pool_3x3"] * 3, "max_pool_7x7"]
    config = settings(windows=windows)
    assert planted_windows(config) == windows
    data = load_planted(config)
    images, labels = data.train_set.tensors
    assert torch.equal(
        answers(student(config, data, teacher_state(config), windows), images), labels
    )


def test_a_teacher_normalises_its_poolings_and_tells_no_statistics_of_them() -> None:
    config = settings("--model.candidate_norm=true")
    labels = load_planted(config).train_targets
    assert labels != load_planted(settings()).train_targets
    state = teacher_state(config)
    assert not any(".pool." in name for name in state)
    backbone = make_backbone(config.model, (BANDS, 12, 12), CLASSES)
    net = build_supernet(backbone, config.model, config.seed, state)
    images = load_planted(config).train_set.tensors[0]
    for site, window in zip(net.sites, planted_windows(config), strict=True):
        net.discretise(site.name, [config.model.candidates.index(window)])
    measure_norms(images.split(256), net.model)
    assert torch.equal(answers(net.model.eval(), images), torch.tensor(labels))


@pytest.mark.parametrize("windows", [["skip_connect"], ["max_pool_9x9"] * 5])
def test_windows_that_do_not_fit_are_refused(windows: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.planted\.windows .* each of the 5 layers"):
        load_planted(settings(windows=windows))


def without_head(num_classes: int, in_chans: int) -> nn.Module:
    """A network that ends in no linear layer."""
    return nn.Sequential(nn.Conv2d(in_chans, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_network_without_a_linear_layer_at_its_end_is_refused() -> None:
    model = ModelConfig(name=f"{__name__}:without_head", insert_after="0")
    with pytest.raises(UserError, match=r"ends in nn\.Linear"):
        load_planted(replace(settings(), model=model))


def test_noise_changes_some_answers() -> None:
    clean, noisy = (load_planted(settings(noise=noise)) for noise in (0.0, 0.3))
    changed = sum(a != b for a, b in zip(clean.train_targets, noisy.train_targets, strict=True))
    assert 0.05 < changed / 512 < 0.5
    assert torch.equal(clean.train_set.tensors[0], noisy.train_set.tensors[0])


GIVEN = (
    "--model.weights=teacher",
    "--search.train_weights=false",
    "--search.warmup=0",
    "--search.alpha.lr=0.02",
)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("arguments", "least"),
    [(GIVEN, 5), ((*GIVEN, "--seed=1", "--config=pmpl"), 5), (("--seed=9",), 4)],
    ids=["weights given", "weights given, as pmpl", "weights learned"],
)
def test_a_search_finds_the_windows(arguments: tuple[str, ...], least: int, tmp_path: Path) -> None:
    """Random choices would find one of five in every seventh layer."""
    options = [f"--config={CONFIG}", f"--output={tmp_path / 'run'}", *arguments]
    assert main(["search", *options]) == 0
    found = load_architecture(tmp_path / "run" / "architecture.json")
    truth = planted_windows(load_config(tmp_path / "run" / "config.yaml"))
    right = [layer.choice[0] == window for layer, window in zip(found.layers, truth, strict=True)]
    assert sum(right) >= least, [layer.choice for layer in found.layers]
