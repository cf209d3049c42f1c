"""Train the derived network on all training images, and the same one without enhancers."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import Architecture, load_architecture
from metapool_kernels.search.bilevel import weight_step
from metapool_kernels.search.config import Config
from metapool_kernels.search.data import Data, steps_per_epoch, training_batches
from metapool_kernels.search.datasets import load_data
from metapool_kernels.search.derive import derive
from metapool_kernels.search.optimizers import make_weight_optimizer
from metapool_kernels.search.report import StepMeter, epoch_line, log_scalars
from metapool_kernels.search.run_folder import Checkpoint, RunFolder

SETTINGS = ("seed", "threads", "data", "adapt")
"""The fields of the configuration that the training depends on."""


def run_adapt(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Train both networks with the same budget, seed and order of images.

    Raises:
        UserError: there is no finished search, it was made on other data, or the networks have
            been trained already and neither ``resume`` nor ``overwrite`` was asked for.
    """
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    searched.check_settings(config, ("seed", "data"))
    data = load_data(config)
    split = searched.load_split()
    images = sorted(split.weight + split.alpha)
    networks: dict[str, Callable[[], nn.Module]] = {
        run_folder.ENHANCED: lambda: _derived(config, architecture, searched, data, images),
        run_folder.PLAIN: lambda: architecture.backbone.build(config.seed),
    }

    run = RunFolder(searched / run_folder.ADAPT)
    run.begin(config, SETTINGS, resume=resume, overwrite=overwrite)
    for name, build in networks.items():
        own = RunFolder(run / name)
        if not (own / run_folder.WEIGHTS).exists():
            training = Training(build(), config, data, images)
            checkpoint = own.load_checkpoint()
            if checkpoint is not None:
                training.restore(checkpoint)
            training.train(own, name)
            own.write_weights(run_folder.WEIGHTS, training.model.state_dict())


def _derived(
    config: Config,
    architecture: Architecture,
    searched: RunFolder,
    data: Data,
    images: Sequence[int],
) -> nn.Module:
    if config.adapt.start == "scratch":
        return derive(architecture, config.seed)
    model = derive(architecture, config.seed, searched.load_weights())
    batches = training_batches(data.train_set, images, config.data, config.seed, 0, epoch_seed=0)
    update_bn(islice(batches, steps_per_epoch(images, config.data)), model)
    return model


class Training:
    """Plain training of one network. ``epoch`` counts the finished ones."""

    def __init__(self, model: nn.Module, config: Config, data: Data, images: Sequence[int]) -> None:
        self.model = model
        self.config = config
        self.data = data
        self.images = images
        self.steps = steps_per_epoch(images, config.data)
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = make_weight_optimizer(
            self.weights, config.adapt.weights, config.adapt.epochs * self.steps
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        # Both networks draw the same numbers, whatever was drawn to build them.
        torch.manual_seed(config.seed)

    def train(self, run: RunFolder, name: str) -> None:
        """Train to the last epoch, saving after each."""
        epochs = self.config.adapt.epochs
        bar = tqdm(
            total=epochs * self.steps, initial=self.epoch * self.steps, desc=name, disable=None
        )
        with run.tensorboard(self.epoch + 1) as writer, bar:
            while self.epoch < epochs:
                row = self._train_epoch(bar)
                self.history.append(row)
                run.save_checkpoint(self._checkpoint(), self.epoch)
                run.write_metrics(self.history)
                log_scalars(writer, row)
                tqdm.write(epoch_line(row, name))

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        started = time.perf_counter()
        config = self.config
        meter = StepMeter()
        first_step = self.epoch * self.steps
        batches = training_batches(
            self.data.train_set,
            self.images,
            config.data,
            config.seed,
            first_step,
            epoch_seed=self.epoch,
        )
        self.model.train()
        for step in range(first_step, first_step + self.steps):
            self.schedule.step_update(step)
            clip = config.adapt.weights.clip
            meter.update(
                *weight_step(self.model, self.weights, next(batches), self.optimizer, clip)
            )
            bar.update()
            bar.set_postfix(**meter.postfix())
        self.epoch += 1
        return {
            "epoch": self.epoch,
            **meter.means(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _checkpoint(self) -> Checkpoint:
        state = {
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "rng": torch.get_rng_state(),
        }
        return Checkpoint(self.model.state_dict(), state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if there had been no break."""
        state = checkpoint.state
        self.model.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]
        self.history = state["history"]
        torch.set_rng_state(state["rng"])
