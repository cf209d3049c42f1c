"""The search as a callback of the real Lightning; ``make test-callbacks`` installs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from metapool_kernels.search import PoolingSearch
from metapool_kernels.search.settings.config import AlphaConfig, StopConfig
from tests.search.networks import Small

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 6


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]  # pl is what was imported
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Small(num_classes=4, in_chans=1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def loader(seed: int) -> "DataLoader[Any]":
    drawn = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(24, 1, 8, 8, generator=drawn), torch.arange(24) % 4)
    return DataLoader(data, 8)


noted: set[torch.dtype] = set()


def loss(network: nn.Module, batch: Any) -> Tensor:
    logits = network(batch[0])
    noted.add(logits.dtype)
    return F.cross_entropy(logits, batch[1])


def fit(folder: Path, epochs: int, ckpt: Path | None = None, **how: Any) -> tuple[Any, Any]:
    from metapool_kernels.search.lightning import PoolingSearchCallback

    module = Module()
    search = PoolingSearch(
        module.net,
        torch.zeros(1, 1, 8, 8),
        r"stem\.0|mid",
        epochs=EPOCHS,
        extra_candidates=["coordinate_attention"],
        alpha=AlphaConfig(lr=0.1, method="fomaml", tilt=1.4, tasks=2),
        stop=StopConfig(delta=0.05, ema=0.5, patience=2),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            PoolingSearchCallback(search, loader(1), loss),
            pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
        ],
        **how,
    )
    trainer.fit(module, loader(0), ckpt_path=ckpt)
    return module, search


def test_a_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    module, search = fit(tmp_path / "whole", EPOCHS)
    stopped = [row["stopped"] for row in search.history]
    assert len(stopped) == EPOCHS and stopped[0] == 0 and stopped[-1] == 2
    middle = next(i for i, count in enumerate(stopped, 1) if count)  # a layer has stopped by then
    fit(tmp_path / "broken", middle)
    again, resumed = fit(
        tmp_path / "broken", EPOCHS, tmp_path / "broken" / f"epoch={middle - 1}.ckpt"
    )
    assert resumed.history == search.history
    assert resumed.trajectory == search.trajectory
    assert resumed.stopping.stops == search.stopping.stops
    assert again.losses == module.losses[3 * middle :]
    tensors = again.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert search.derive().eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_losses_are_computed_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    noted.clear()
    _, search = fit(tmp_path, 2, precision="bf16-mixed")
    assert noted == {torch.bfloat16}
    assert search.step == 6
