"""Plain training of one network, on all training images."""

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from metapool_kernels.search.data.splits import Data, steps_per_epoch, training_batches
from metapool_kernels.search.machine.console import StepMeter, epoch_line, log_scalars
from metapool_kernels.search.machine.processes import check_processes, prepare_model, seed_epoch
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.optimizers import make_weight_optimizer
from metapool_kernels.search.training.steps import to_device, weight_step

_EMA = "ema."
"""Prefix, in a checkpoint, of the averaged weights."""


class Training:
    """Everything that changes while training. ``epoch`` counts the finished ones."""

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        data: Data,
        images: Sequence[int],
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.network = network
        self.config = config
        self.train_set = data.train_set
        self.images = images
        self.seed = seed
        self.accelerator = accelerator
        self.steps = steps_per_epoch(images, config.data, accelerator.num_processes)
        self.model = prepare_model(accelerator, network)
        decay = config.adapt.ema
        self.ema = None if decay is None else ModelEmaV3(network, decay=decay)
        self.optimizer, self.schedule = make_weight_optimizer(
            [p for p in network.parameters() if p.requires_grad],
            config.adapt.weights,
            config.adapt.epochs * self.steps,
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def train(self, run: RunFolder, name: str, *, quiet: bool = False) -> None:
        """Train to the last epoch, saving after each; ``quiet`` prints nothing."""
        main = self.accelerator.is_main_process
        epochs = self.config.adapt.epochs
        bar = tqdm(
            total=epochs * self.steps,
            initial=self.epoch * self.steps,
            desc=name,
            disable=None if main and not quiet else True,
        )
        with run.tensorboard(self.epoch + 1, active=main) as writer, bar:
            while self.epoch < epochs:
                row = self._train_epoch(bar)
                self.history.append(row)
                if main:
                    run.save_checkpoint(self._checkpoint(), self.epoch)
                    run.write_metrics(self.history)
                    log_scalars(writer, row)
                    if not quiet:
                        tqdm.write(epoch_line(row, name))

    def tensors(self) -> dict[str, Tensor]:
        """The trained network: the averaged weights where there are such."""
        trained: nn.Module = self.network if self.ema is None else self.ema.module
        return trained.state_dict()

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        started = time.perf_counter()
        config = self.config
        meter = StepMeter(self.accelerator)
        # Every network sees the same images in the same order, and draws the same dropout.
        epoch_seed = seed_epoch(self.accelerator, self.seed, self.epoch)
        batches = training_batches(
            self.train_set,
            self.images,
            config.data,
            self.seed,
            self.epoch * self.steps * config.data.accumulate,
            epoch_seed=epoch_seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        moved = to_device(batches, self.accelerator.device)
        self.model.train()
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            self.schedule.step_update(step)
            together = list(islice(moved, config.data.accumulate))
            meter.update(
                *weight_step(
                    self.accelerator, self.model, together, self.optimizer, config.adapt.weights
                )
            )
            if self.ema is not None:
                self.ema.update(self.network)
            if bar.update():
                bar.set_postfix(**meter.postfix(), refresh=False)
        self.epoch += 1
        return {
            "epoch": self.epoch,
            **meter.means(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _checkpoint(self) -> Checkpoint:
        weights = self.network.state_dict()
        if self.ema is not None:
            averaged = self.ema.module.state_dict()
            weights |= {_EMA + name: tensor for name, tensor in averaged.items()}
        state = {
            "epoch": self.epoch,
            "processes": self.accelerator.num_processes,
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        return Checkpoint(weights, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if there had been no break.

        Raises:
            UserError: it was made by another number of processes.
        """
        check_processes(self.accelerator, checkpoint.state["processes"])
        averaged = {
            name.removeprefix(_EMA): tensor
            for name, tensor in checkpoint.weights.items()
            if name.startswith(_EMA)
        }
        if self.ema is not None:
            self.ema.module.load_state_dict(averaged)
        self.network.load_state_dict(
            {n: t for n, t in checkpoint.weights.items() if not n.startswith(_EMA)}
        )
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.epoch = checkpoint.state["epoch"]
        self.history = checkpoint.state["history"]
