"""The search as a callback of the Trainer of Hugging Face. Needs the extra ``transformers``."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metapool_kernels.search.pooling_search import PoolingSearch
from metapool_kernels.search.training.objective import NetworkLoss

try:
    from accelerate.utils import send_to_device
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "metapool_kernels.search.transformers needs the Trainer: pip install "
        '"metapool_kernels[transformers]"'
    ) from error

FOLDER = "pooling_search"
"""In each checkpoint of the Trainer, of :meth:`PoolingSearch.save`."""


def own_loss(network: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of Transformers computes itself.

    By the forward of its class: the Trainer puts one of its own into the model, bound to that.
    """
    loss: Tensor = type(network).forward(network, **batch).loss
    return loss


class PoolingSearchCallback(TrainerCallback):
    """A step of alpha before each step of the weights, stops at the end of each epoch.

    To go on from a checkpoint, with ``save_strategy="epoch"`` and the numbers of an uninterrupted
    run: ``PoolingSearch.load(f"{checkpoint}/pooling_search", model)`` before the Trainer is made,
    then ``trainer.train(resume_from_checkpoint=checkpoint)``. Under DDP, networks with extra
    candidates need ``ddp_find_unused_parameters``.

    Args:
        search: made of the Trainer's model, before the Trainer.
        validation: collated batches that train alpha, and never the weights; shuffled.
        loss: of a network like the model, and a batch, on its device, in the Trainer's precision.
        inner: collated training batches, for every method but ``first-order``: callbacks are not
            told those of the Trainer.
    """

    def __init__(
        self,
        search: PoolingSearch,
        validation: "DataLoader[Any]",
        loss: Callable[[nn.Module, Any], Tensor] = own_loss,
        inner: "DataLoader[Any] | None" = None,
    ) -> None:
        self.search = search
        self.validation = validation
        self.inner = inner
        self.loss = loss
        self._batches: Iterator[Any] = iter(())
        self._inner_batches: Iterator[Any] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a search that is not where the Trainer is.

        Raises:
            ValueError: they have ended different numbers of epochs.
        """
        ended = round(state.epoch or 0)
        if ended != self.search.epoch:
            raise ValueError(
                f"the Trainer begins after {ended} epochs, the search after {self.search.epoch}; "
                f'make the search by PoolingSearch.load(f"{{checkpoint}}/{FOLDER}", model)'
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches = self.search.cycle(self.validation)
        if self.inner is not None:
            self._inner_batches = self.search.cycle(self.inner)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        learns = self.search.learns_alpha
        batch = next(self._batches) if learns else None
        inner = None
        if learns and self.inner is not None:
            inner = self._loss_of(args, next(self._inner_batches))
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        self.search.supernet.model.train()  # it has been evaluated, perhaps
        self.search.alpha_step(
            self._loss_of(args, batch),
            inner,
            xi=optimizer.param_groups[0]["lr"],
            scale=1.0 if scaler is None else scaler.get_scale(),
        )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.search.end_epoch(
            (self._loss_of(args, batch) for batch in self.validation), optimizer=kwargs["optimizer"]
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.search.save(Path(args.output_dir, f"checkpoint-{state.global_step}", FOLDER))

    def _loss_of(self, args: TrainingArguments, batch: Any) -> NetworkLoss:
        def loss(network: nn.Module) -> Tensor:
            with _autocast(args):
                return self.loss(network, send_to_device(batch, args.device))

        return loss


def _autocast(args: TrainingArguments) -> AbstractContextManager[object]:
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
