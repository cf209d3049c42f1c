"""A finished search that several tests look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from metapool_kernels.search.cli import main
from metapool_kernels.search.commands import plot
from tests.search.runs import options


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """As configs/digits.yaml asks for, also where no command line is run; undone afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """An Accelerator that says nothing of precision takes that of the one before, in bf16 too."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is remembered in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a search that nothing has interrupted. Not to be written into."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["search", *options(folder)]) == 0
    return folder


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and written as ever, but empty: test_figures.py is about what they show.

    Every command draws them, which takes seconds more than a search as small as these.
    """
    monkeypatch.setattr(plot, "png", lambda figure: b"\x89PNG")
    monkeypatch.setattr(plot, "_receptive_fields", lambda architecture: Figure())
