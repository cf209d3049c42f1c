"""The search as a callback of the real Trainer; ``make test-callbacks`` installs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metapool_kernels.search import PoolingSearch
from metapool_kernels.search.settings.config import AlphaConfig, StopConfig

hf = pytest.importorskip("transformers", reason="Transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 6


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.images = torch.randn(24, 3, 32, 32, generator=drawn)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": torch.tensor(index % 4)}


def make_model() -> Any:
    torch.manual_seed(0)
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        )
    )


def begin(model: Any) -> PoolingSearch:
    return PoolingSearch(
        model,
        {"pixel_values": torch.zeros(1, 3, 32, 32)},
        r".*\.layer\.0\.normalization",
        epochs=EPOCHS,
        extra_candidates=["coordinate_attention"],
        alpha=AlphaConfig(lr=0.1, method="fomaml", tilt=1.4, tasks=2),
        stop=StopConfig(delta=0.05, ema=0.5, patience=2),
    )


def train(
    folder: Path, epochs: int, model: Any, search: PoolingSearch, checkpoint: Path | None = None
) -> list[float]:
    """Losses of the epochs."""
    from metapool_kernels.search.transformers import PoolingSearchCallback

    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    class Break(hf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.epoch >= epochs
            return control

    trainer = hf.Trainer(
        model=model,
        args=arguments,
        train_dataset=Images(0),
        callbacks=[
            PoolingSearchCallback(search, DataLoader(Images(1), 8), inner=DataLoader(Images(0), 8)),
            Break(),
        ],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    model = make_model()
    search = begin(model)
    losses = train(tmp_path / "whole", EPOCHS, model, search)
    stopped = [row["stopped"] for row in search.history]
    assert len(stopped) == EPOCHS and stopped[0] == 0 and stopped[-1] == 2
    middle = next(i for i, count in enumerate(stopped, 1) if count)  # a layer has stopped by then
    other = make_model()
    train(tmp_path / "broken", middle, other, begin(other))
    again = make_model()
    checkpoint = tmp_path / "broken" / f"checkpoint-{3 * middle}"
    resumed = PoolingSearch.load(checkpoint / "pooling_search", again)
    assert train(tmp_path / "broken", EPOCHS, again, resumed, checkpoint) == losses
    assert resumed.history == search.history
    assert resumed.trajectory == search.trajectory
    assert resumed.stopping.stops == search.stopping.stops
    tensors = again.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert search.derive().eval()(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)

    with pytest.raises(ValueError, match=r"the search after 6; make the search by PoolingSearch"):
        train(tmp_path / "new", EPOCHS, again, resumed)
