"""The search as a callback of Lightning's Trainer. Needs the extra ``lightning``."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from metapool_kernels.search.pooling_search import PoolingSearch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "metapool_kernels.search.lightning needs Lightning: pip install "
        '"metapool_kernels[lightning]"'
    ) from error


class PoolingSearchCallback(Callback):
    """A step of alpha before each batch, stops at the end of each epoch; goes on from checkpoints.

    ``Trainer.fit(..., ckpt_path=...)`` goes on with the numbers of an uninterrupted run after a
    checkpoint that was saved at the end of an epoch, in a module whose network has had its
    enhancers put in the same way. Under DDP, networks with extra candidates need the strategy
    ``ddp_find_unused_parameters_true``.

    Args:
        search: made of the module's network, before the Trainer asks for optimizers.
        validation: batches that train alpha, and never the weights; shuffled.
        loss: of a network like the one that was searched, and a batch, on its device. It runs in
            the Trainer's precision, and must not log.
    """

    def __init__(
        self,
        search: PoolingSearch,
        validation: "DataLoader[Any]",
        loss: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        self.search = search
        self.validation = validation
        self.loss = loss
        self._batches: Iterator[Any] = iter(())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module's tensors are loaded before any callback hears of a checkpoint, and the
        network has to have their shapes by then.
        """
        on_load_checkpoint = pl_module.on_load_checkpoint

        def restructure_first(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self.search.load_state_dict(state)
            on_load_checkpoint(checkpoint)

        if stage == "fit":
            pl_module.on_load_checkpoint = restructure_first

    def state_dict(self) -> dict[str, Any]:
        """Goes into every checkpoint."""
        return self.search.state_dict()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = self.search.cycle(self.validation)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.search.learns_alpha:
            validation = None
        else:
            validation = trainer.strategy.batch_to_device(next(self._batches))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.search.alpha_step(
            self._loss_of(trainer, validation),
            self._loss_of(trainer, batch),
            xi=trainer.optimizers[0].param_groups[0]["lr"],
            scale=1.0 if scaler is None else scaler.get_scale(),
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = map(trainer.strategy.batch_to_device, self.validation)
        self.search.end_epoch(
            (self._loss_of(trainer, batch) for batch in batches), optimizer=trainer.optimizers[0]
        )

    def _loss_of(self, trainer: Trainer, batch: Any) -> Callable[[nn.Module], Tensor]:
        def loss(network: nn.Module) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return self.loss(network, batch)

        return loss
