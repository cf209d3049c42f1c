"""A search whose poolings are normalised before they are weighted, from its start to its files."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import NormalizedMetaPool2d
from metapool_kernels.search.cli import main
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.method import stopping
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.networks.norms import measure_norms
from metapool_kernels.search.run.controls import load_network
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config_file import load_config
from tests.search.runs import SHALLOW, options

pytestmark = pytest.mark.usefixtures("quick_pictures")

CHANGES = SHALLOW | {
    "model__candidate_norm": True,
    "model__count_include_pad": False,
    # Both layers stay open, and keep these two at the deadline.
    "model__candidates": ["max_pool_3x3", "avg_pool_3x3"],
    "search__epochs": 3,
    "search__stop__delta": 0.9,
    "adapt__epochs": 1,
    "adapt__start": "searched",
    "adapt__weights__lr": 1e-12,
    "adapt__ema": 0.5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers kept their poolings in another order than that of alpha, as averages can have it."""
    folder = tmp_path_factory.mktemp("normalised") / "run"
    ranking = stopping.ranking
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "ranking", lambda scores: ranking(scores)[::-1])
        assert main(["search", *options(folder, **CHANGES)]) == 0
    for command in ("adapt", "evaluate"):
        assert main([command, *options(folder, **CHANGES)]) == 0
    return folder


def training_images(run: Path) -> Tensor:
    data = load_data(load_config(run / "config.yaml"))
    split = RunFolder(run).load_split()
    return torch.stack([data.train_set[i][0] for i in sorted(split.weight + split.alpha)])


def test_search_adapt_and_evaluate_run_with_normalised_poolings(run: Path) -> None:
    architecture = load_architecture(run / "architecture.json")
    assert architecture.candidate_norm
    assert [len(layer.choice) for layer in architecture.layers] == [2, 2]
    trained = RunFolder(run / "adapt" / "searched" / "0")
    network = load_network("searched", architecture, 0, trained)
    pools = [m for m in network.modules() if isinstance(m, NormalizedMetaPool2d)]
    assert [pool.candidates for pool in pools] == [
        tuple(layer.choice) for layer in architecture.layers
    ]
    result = json.loads((run / "evaluation.json").read_text())["networks"]["searched"]
    data = load_data(load_config(run / "config.yaml"))
    images, targets = data.evaluation_set[data.evaluation]
    with torch.no_grad():
        correct = (network.eval()(images).argmax(1) == targets).sum().item()
    assert abs(result["seeds"]["0"]["correct"] - correct) <= 2  # batches of other sizes round


def test_the_supernet_is_kept_with_the_statistics_in_the_order_of_the_choice(run: Path) -> None:
    """That pooling varies more which does so on training images."""
    architecture = load_architecture(run / "architecture.json")
    checkpoint = RunFolder(run).load_checkpoint()
    assert checkpoint is not None
    kept_as = [
        [architecture.candidates[k] for k in stop["keep"]]
        for stop in checkpoint.state["stopping"]["stops"]
    ]
    assert kept_as == [layer.choice[::-1] for layer in architecture.layers]
    weights = RunFolder(run).load_weights()
    network = derive(architecture, 0, weights)
    measure_norms([training_images(run)], network)
    for layer in architecture.layers:
        name = f"{layer.name}.enhancer.pool.running_var"
        measured, kept = network.state_dict()[name], weights[name]
        assert torch.equal(kept[0] > kept[1], measured[0] > measured[1])


def test_searched_weights_begin_with_statistics_measured_anew(run: Path) -> None:
    """A learning rate of almost nothing leaves what training has begun with."""
    architecture = load_architecture(run / "architecture.json")
    supernet = RunFolder(run).load_weights()
    network = derive(architecture, 0, supernet)
    measure_norms([training_images(run)], network)
    adapted = RunFolder(run / "adapt" / "searched" / "0").load_weights()
    for layer, expected in network.state_dict().items():
        if layer.endswith("pool.running_mean"):
            stale = supernet[layer]
            assert (adapted[layer] - expected).norm() < 0.3 * (stale - expected).norm(), layer


def test_statistics_become_means_over_the_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        NormalizedMetaPool2d(3, ("max_pool_3x3", "skip_connect", "avg_pool_3x3")),
        nn.BatchNorm2d(3),
    ).eval()
    pool = network[0]
    batches = torch.randn(4, 8, 3, 6, 6) + torch.arange(4.0).view(4, 1, 1, 1, 1)
    network.train()(10 * batches[0])
    network.eval()
    measure_norms(batches, network)
    outs = torch.nn.functional.max_pool2d(batches.flatten(0, 1), 3, 1, 1).unflatten(0, (4, 8))
    torch.testing.assert_close(pool.running_mean[0], outs.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(pool.running_var[0], outs.transpose(1, 2).flatten(2).var(2).mean(0))
    assert (pool.num_batches_tracked, pool.momentum) == (4, 0.1)
    assert not network.training and network[1].momentum == 0.1
