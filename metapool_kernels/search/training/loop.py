"""The search: warm up the weights, learn alpha, fix the layers one after the other."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from metapool_kernels.search.data.splits import (
    Batch,
    Data,
    Split,
    check_share,
    steps_per_epoch,
    training_batches,
)
from metapool_kernels.search.machine.console import StepMeter, epoch_line, log_scalars
from metapool_kernels.search.machine.processes import check_processes, prepare_model, seed_epoch
from metapool_kernels.search.method.stopping import phases
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import build_supernet
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.objective import NetworkLoss
from metapool_kernels.search.training.optimizers import make_weight_optimizer
from metapool_kernels.search.training.steps import batch_loss, to_device, weight_step
from metapool_kernels.search.training.upper_level import UpperLevel


class Search:
    """A :class:`UpperLevel` in a training loop, with images, weights and files of its own."""

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        data: Data,
        split: Split,
        accelerator: Accelerator,
        initial: Mapping[str, Tensor] | None = None,
        table: CostTable | None = None,
    ) -> None:
        """Build the supernet, with its weights as drawn or as ``initial``.

        ``table`` has what the candidates cost, where costs play a part.

        Raises:
            UserError: the schedule, the model, the number of processes or the table does not work.
        """
        self.config = config
        self.settings = settings = config.search
        self.accelerator = accelerator
        self.train_set = data.train_set
        self.split = split
        for half in (split.weight, split.alpha):
            check_share(half, accelerator.num_processes)
        self.steps = steps_per_epoch(split.weight, config.data, accelerator.num_processes)
        phases(settings)  # refused before a network is built
        supernet = build_supernet(backbone, config.model, config.seed, initial)
        if table is not None:
            names = supernet.candidate_names
            table = table.fitted("search.cost.file", backbone, supernet.sites, names)
        self.upper = UpperLevel(supernet, backbone, settings, seed=config.seed, table=table)
        self.layers = self.upper.layers
        self.begin_training()

    def begin_training(self) -> None:
        """Everything that notes what it was trained with is made anew."""
        supernet, settings = self.upper.supernet, self.settings
        self.model = prepare_model(self.accelerator, supernet.model)
        self.weight_optimizer, self.schedule = make_weight_optimizer(
            list(supernet.weights().values()), settings.weights, settings.epochs * self.steps
        )
        self.upper.begin_training()

    def train(self, run: RunFolder) -> None:
        """Search until every layer has stopped, saving after each epoch.

        The epochs that are left then would train weights alone, and on half of the images;
        adapting does that better, so they are not spent.
        """
        main, upper = self.accelerator.is_main_process, self.upper
        bar = tqdm(
            total=upper.deadline * self.steps,
            initial=upper.epoch * self.steps,
            desc="search",
            disable=None if main else True,
        )
        with run.tensorboard(upper.epoch + 1, active=main) as writer, bar:
            while upper.stopping.open_layers:
                row = self.run_epoch(bar)
                if main:
                    run.save_checkpoint(self._checkpoint(), upper.epoch)
                    run.write_metrics(upper.history)
                    run.write_probabilities(self.layers, upper.trajectory)
                    log_scalars(writer, row)
                    tqdm.write(epoch_line(row, f"stopped {self._count_stopped()}"))

    def run_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        """Train for one epoch, fix the layers that are decided then, and return its numbers."""
        started = time.perf_counter()
        numbers = self._train_epoch(bar)
        stops = self.upper.end_epoch(
            self._alpha_losses(), numbers=numbers, optimizer=self.weight_optimizer
        )
        if stops:
            self.model = prepare_model(self.accelerator, self.upper.supernet.model)
        row = self.upper.history[-1]
        row["seconds"] = round(time.perf_counter() - started, 2)  # what a rule measures counts
        return row

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        started = time.perf_counter()
        upper, epoch = self.upper, self.upper.epoch
        learns_alpha = upper.learns_alpha
        epoch_seed = seed_epoch(self.accelerator, self.config.seed, epoch)
        batches = self._batches(self.split.weight, epoch, epoch_seed)
        alpha_batches = self._batches(self.split.alpha, epoch - upper.warmup, epoch_seed + 1)
        meter, alpha_meter = StepMeter(self.accelerator), StepMeter(self.accelerator)
        self.model.train()
        for step in range(epoch * self.steps, (epoch + 1) * self.steps):
            self.schedule.step_update(step)
            train = self._together(batches)
            if learns_alpha:
                alpha_meter.update(*self._alpha_step(train, alpha_batches, step))
            if self.settings.train_weights:
                meter.update(*self._weight_step(train))
            if bar.update():  # it is being drawn, which is not at every step
                bar.set_postfix(**meter.postfix(), stopped=self._count_stopped(), refresh=False)
        alpha_means = alpha_meter.means()
        seconds = time.perf_counter() - started
        return {
            **meter.means(),
            "alpha_loss": alpha_means["loss"],
            "alpha_accuracy": alpha_means["accuracy"],
            "lr": self.weight_optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 2),
            "step_ms": round(1000 * seconds / self.steps, 3),
        }

    def first_batches(self) -> tuple[list[Batch], list[Batch]]:
        """What a first step of each level takes from its own half."""
        epoch_seed = seed_epoch(self.accelerator, self.config.seed, 0)
        halves = self.split.weight, self.split.alpha
        weight, alpha = (self._together(self._batches(half, 0, epoch_seed)) for half in halves)
        return weight, alpha

    def take_first_step(self, train: Sequence[Batch], validation: Sequence[Batch]) -> list[Tensor]:
        """A step of each level, as in an epoch; their losses."""
        self.model.train()
        self.schedule.step_update(0)
        return [self._alpha_step(train, iter(validation), 0)[0], self._weight_step(train)[0]]

    def _together(self, batches: Iterator[Batch]) -> list[Batch]:
        """As many batches as one step takes."""
        return list(islice(batches, self.config.data.accumulate))

    def _alpha_step(
        self, train: Sequence[Batch], validation: Iterator[Batch], step: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy in percent, before the step."""
        self.upper.step = step
        lr = self.weight_optimizer.param_groups[0]["lr"]
        found = [
            self.upper.gradient(self.loss_of(v), self.loss_of(t), xi=lr)
            for t, v in zip(train, validation, strict=False)
        ]
        accuracies = [torch.stack(one.beside).mean() for one in found]
        return self.upper.move(found), torch.stack(accuracies).mean()

    def _weight_step(self, train: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        weights = self.settings.weights
        return weight_step(self.accelerator, self.model, train, self.weight_optimizer, weights)

    def loss_of(self, batch: Batch) -> NetworkLoss:
        """Loss and accuracy on a batch, in the precision of the run."""
        return partial(
            batch_loss,
            batch=batch,
            label_smoothing=self.settings.weights.label_smoothing,
            autocast=self.accelerator.autocast,
        )

    def _batches(self, images: Sequence[int], epoch: int, epoch_seed: int) -> Iterator[Batch]:
        """Endless; ``epoch`` counts from the first in which these images are used."""
        first = max(0, epoch) * self.steps * self.config.data.accumulate
        batches = training_batches(
            self.train_set,
            images,
            self.config.data,
            self.config.seed,
            first,
            epoch_seed=epoch_seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        return to_device(batches, self.accelerator.device)

    def _alpha_losses(self) -> Iterator[NetworkLoss]:
        """What importances are measured on: the same images at each check."""
        count = (
            steps_per_epoch(self.split.alpha, self.config.data, self.accelerator.num_processes)
            * self.config.data.accumulate
        )
        batches = self._batches(self.split.alpha, 0, self.config.seed)
        return map(self.loss_of, islice(batches, count))

    def _count_stopped(self) -> str:
        return f"{len(self.upper.stopping.stops)}/{len(self.layers)}"

    def _checkpoint(self) -> Checkpoint:
        state = {
            "processes": self.accelerator.num_processes,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            **self.upper.state_dict(),
        }
        return Checkpoint(self.upper.supernet.model.state_dict(), state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if there had been no break.

        Raises:
            UserError: it was made by another number of processes.
        """
        state, model = checkpoint.state, self.upper.supernet.model
        check_processes(self.accelerator, state["processes"])
        self.upper.load_state_dict(state, optimizer=self.weight_optimizer)
        model.load_state_dict(checkpoint.weights)
        self.model = prepare_model(self.accelerator, model)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
