"""Wall time of a search epoch: our op against the eager mix, and with layers that stop or do not.

Run by ``python -m benches.search_quality``. All variants take the same steps of the same search
loop, epoch by epoch in turn, in one process.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from metapool_kernels import nn as modules
from metapool_kernels import reference
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.splits import split_data
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.networks.backbone import make_backbone
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import config_parser, to_config
from metapool_kernels.search.training.loop import Search

OURS, ALL_OPEN, EAGER = "ours", "ours, all layers open", "eager mix, all layers open"
CONFIGS = Path(__file__).parents[1] / "configs"


def _eager_mix(
    x: Tensor,
    alpha: Tensor,
    candidates: Sequence[str],
    *,
    normalize: str | None,
    stride: tuple[int, int],
    count_include_pad: bool,
    backend: str | None,
) -> Tensor:
    """What the op computes, as the usual loop over ``torch.nn`` poolings does."""
    weights = alpha.softmax(-1) if normalize == "softmax" else alpha
    return reference.mix(x, weights, parse_candidates(candidates), stride, count_include_pad)


@contextmanager
def _mixing(variant: str) -> Iterator[None]:
    if variant == EAGER:
        with mock.patch.object(modules, "fused_meta_pool", _eager_mix):
            yield
    else:
        yield


def make_config(name: str, changes: Mapping[str, Any]) -> Config:
    """One of ``configs/`` with some settings changed."""
    parser = config_parser()
    parsed = parser.parse_path(str(CONFIGS / f"{name}.yaml"))
    for setting, value in changes.items():
        parsed[setting] = value
    return to_config(parser.instantiate(parsed))


def epoch_seconds(
    name: str, changes: Mapping[str, Any], epochs: int, variants: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of each epoch of each variant; the variants take turns.

    A search in which every layer has stopped has ended, and has fewer epochs.
    """
    config = make_config(name, changes)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config)
    split = split_data(data, config.search.alpha_half, config.seed)
    backbone = make_backbone(config.model, data.image_shape, len(data.classes))
    accelerator = make_accelerator(config)
    searches = {}
    for variant in variants:
        own = make_config(name, {**changes, "search.progressive": variant == OURS})
        searches[variant] = Search(own, backbone, data, split, accelerator)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    with tqdm(disable=True) as bar:
        for _ in range(epochs):
            for variant, search in searches.items():
                if search.upper.stopping.open_layers:
                    with _mixing(variant):
                        seconds[variant].append(search.run_epoch(bar)["seconds"])
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median of the ratios of epochs that ran one after the other."""
    return statistics.median(s / f for s, f in zip(slower, faster, strict=False))
