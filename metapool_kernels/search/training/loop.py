"""The search: warm up the weights, learn alpha, fix the layers one after the other."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

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
from metapool_kernels.search.machine.processes import (
    check_processes,
    mean_over_processes,
    on_main,
    prepare_model,
    seed_epoch,
)
from metapool_kernels.search.method.bilevel import (
    Hypergradient,
    Objective,
    draw_tasks,
    hypergradient,
    importances,
)
from metapool_kernels.search.method.expected_cost import ExpectedCost
from metapool_kernels.search.method.stopping import ProgressiveStopping, Stop, phases
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import Supernet
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.optimizers import (
    forget,
    make_alpha_optimizer,
    make_weight_optimizer,
)
from metapool_kernels.search.training.steps import (
    alpha_step,
    batch_loss,
    network_objective,
    to_device,
    weight_step,
)


class Search:
    """Everything that changes while searching. ``epoch`` counts the finished ones."""

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
        self.warmup, deadline = phases(settings)
        self.supernet = Supernet(backbone, config.model, config.seed, initial)
        self.layers = [site.name for site in self.supernet.sites]
        self.stopping = ProgressiveStopping(
            self.layers,
            settings.stop,
            deadline=deadline,
            progressive=settings.progressive,
        )
        self.table = None
        if table is not None:
            names = self.supernet.candidate_names
            self.table = table.fitted("search.cost.file", backbone, self.supernet.sites, names)
        self.begin_training()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.trajectory = [self.supernet.probabilities(self.layers)]
        self.stopped_alphas: dict[str, list[float]] = {}

    def begin_training(self) -> None:
        """Everything that notes what it was trained with is made anew."""
        settings = self.settings
        self.model = prepare_model(self.accelerator, self.supernet.model)
        self.weight_optimizer, self.schedule = make_weight_optimizer(
            list(self.supernet.weights().values()), settings.weights, settings.epochs * self.steps
        )
        self.alpha_optimizer = make_alpha_optimizer(
            self.supernet.alphas(self.layers), settings.alpha
        )
        self.cost = None
        if self.table is not None:
            costs = self.table.relative(self.supernet.candidate_names)
            self.cost = ExpectedCost(costs, settings.cost, settings.alpha.lr)

    def train(self, run: RunFolder) -> None:
        """Search until every layer has stopped, saving after each epoch.

        The epochs that are left then would train weights alone, and on half of the images;
        adapting does that better, so they are not spent.
        """
        main = self.accelerator.is_main_process
        bar = tqdm(
            total=self.stopping.deadline * self.steps,
            initial=self.epoch * self.steps,
            desc="search",
            disable=None if main else True,
        )
        with run.tensorboard(self.epoch + 1, active=main) as writer, bar:
            while self.stopping.open_layers:
                row = self.run_epoch(bar)
                if main:
                    run.save_checkpoint(self._checkpoint(), self.epoch)
                    run.write_metrics(self.history)
                    run.write_probabilities(self.layers, self.trajectory)
                    log_scalars(writer, row)
                    tqdm.write(epoch_line(row, f"stopped {self._count_stopped()}"))

    def run_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        """Train for one epoch, fix the layers that are decided then, and return its numbers."""
        started = time.perf_counter()
        row = self._train_epoch(bar)
        self.trajectory.append(self.supernet.probabilities(self.stopping.open_layers))
        self._stop_layers()
        row["seconds"] = round(time.perf_counter() - started, 2)  # what a rule measures counts
        row["stopped"] = len(self.stopping.stops)
        if self.cost is not None:
            row |= self.cost.numbers(self.supernet.alphas(self.stopping.open_layers))
        self.history.append(row)
        return row

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        started = time.perf_counter()
        learns_alpha = self.epoch >= self.warmup
        epoch_seed = seed_epoch(self.accelerator, self.config.seed, self.epoch)
        batches = self._batches(self.split.weight, self.epoch, epoch_seed)
        alpha_batches = self._batches(self.split.alpha, self.epoch - self.warmup, epoch_seed + 1)
        gradient = self._hypergradient()
        meter, alpha_meter = StepMeter(self.accelerator), StepMeter(self.accelerator)
        self.model.train()
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            self.schedule.step_update(step)
            train = self._together(batches)
            if learns_alpha:
                found = [gradient(t, v, step) for t, v in zip(train, alpha_batches, strict=False)]
                alpha_meter.update(*self._alpha_step(found))
                self.stopping.update(self.supernet.probabilities(self.stopping.open_layers))
            if self.settings.train_weights:
                meter.update(*self._weight_step(train))
            if bar.update():  # it is being drawn, which is not at every step
                bar.set_postfix(**meter.postfix(), stopped=self._count_stopped(), refresh=False)
        self.epoch += 1
        alpha_means = alpha_meter.means()
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
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
        gradient = self._hypergradient()
        self.model.train()
        self.schedule.step_update(0)
        found = [gradient(t, v, 0) for t, v in zip(train, validation, strict=True)]
        return [self._alpha_step(found)[0], self._weight_step(train)[0]]

    def _together(self, batches: Iterator[Batch]) -> list[Batch]:
        """As many batches as one step takes."""
        return list(islice(batches, self.config.data.accumulate))

    def _alpha_step(self, found: Sequence[Hypergradient]) -> tuple[Tensor, Tensor]:
        alphas = self.supernet.alphas(self.stopping.open_layers)
        of_cost = None if self.cost is None else self.cost.step(alphas)
        return alpha_step(self.accelerator, alphas, self.alpha_optimizer, found, of_cost)

    def _weight_step(self, train: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        weights = self.settings.weights
        return weight_step(self.accelerator, self.model, train, self.weight_optimizer, weights)

    def own_loss(self, batch: Batch) -> Tensor:
        """Of the network with its own tensors, in the precision of the run."""
        smoothing = self.settings.weights.label_smoothing
        loss, _ = batch_loss(self.supernet.model, batch, smoothing, self.accelerator.autocast)
        return loss

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

    def objective(self, weights: Iterable[str], layers: Iterable[str]) -> Objective:
        """The loss as a function of some weights and of the alphas of some layers, by their names.

        In the precision of the run, and in the present mode of the network.
        """
        return network_objective(
            self.supernet.model,
            list(weights),
            [self.supernet.alpha_name(layer) for layer in layers],
            self.settings.weights.label_smoothing,
            self.accelerator.autocast,
        )

    def _hypergradient(self) -> Callable[[Batch, Batch, int], Hypergradient]:
        """That in the alphas of the open layers, by batches and step."""
        settings, layers = self.settings.alpha, self.stopping.open_layers
        weights = self.supernet.weights()
        objective = self.objective(weights, layers)
        candidates = len(self.supernet.candidate_names)

        def gradient(train: Batch, validation: Batch, step: int) -> Hypergradient:
            lr = self.weight_optimizer.param_groups[0]["lr"]
            return hypergradient(
                objective,
                list(weights.values()),
                self.supernet.alphas(layers),
                train,
                validation,
                method=settings.method,
                xi=lr if settings.xi is None else settings.xi,
                tasks=draw_tasks(
                    candidates, settings.tasks, settings.tilt, [self.config.seed, step]
                ),
                tilt=settings.tilt,
            )

        return gradient

    def _stop_layers(self) -> None:
        """Decided once, in the main process."""
        asked = self.stopping.asks_for_importances(self.epoch)
        measured = self._importances() if asked else None
        stops = on_main(self.accelerator, lambda: self.stopping.check(self.epoch, measured))
        self.stopping.fix(stops)
        for stop in stops:
            self._discretise(stop)
        if stops:
            self.model = prepare_model(self.accelerator, self.supernet.model)

    def _importances(self) -> dict[str, list[float]]:
        """Of the open layers' candidates, over all processes.

        For the loss on the alpha half and the weighted cost: to leave out a dear one saves.
        """
        layers = self.stopping.open_layers
        count = min(
            self.settings.stop.batches,
            steps_per_epoch(self.split.alpha, self.config.data, self.accelerator.num_processes)
            * self.config.data.accumulate,
        )
        # The same images at each check.
        batches = list(islice(self._batches(self.split.alpha, 0, self.config.seed), count))
        self.supernet.model.train()
        alphas = self.supernet.alphas(layers)
        objective = self.objective([], layers)
        if self.cost is not None:
            objective = self.cost.beside(objective, alphas)
        means = mean_over_processes(self.accelerator, importances(objective, [], alphas, batches))
        return {layer: mean.tolist() for layer, mean in zip(layers, means, strict=True)}

    def _discretise(self, stop: Stop) -> None:
        alpha = self.supernet.alpha(stop.layer)
        forget(self.alpha_optimizer, alpha)
        self.stopped_alphas[stop.layer] = alpha.detach().tolist()
        if self.cost is not None:
            self.cost.settle(stop.layer, stop.keep)
        for weight in self.supernet.discretise(stop.layer, stop.keep):
            forget(self.weight_optimizer, weight)

    def _count_stopped(self) -> str:
        return f"{len(self.stopping.stops)}/{len(self.layers)}"

    def _checkpoint(self) -> Checkpoint:
        state = {
            "epoch": self.epoch,
            "processes": self.accelerator.num_processes,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "stopping": self.stopping.state_dict(),
            "stopped_alphas": self.stopped_alphas,
            "history": self.history,
            "trajectory": self.trajectory,
        }
        if self.cost is not None:
            state["cost_multiplier"] = self.cost.multiplier
        return Checkpoint(self.supernet.model.state_dict(), state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if there had been no break.

        Raises:
            UserError: it was made by another number of processes.
        """
        state = checkpoint.state
        check_processes(self.accelerator, state["processes"])
        self.stopping.load_state_dict(state["stopping"])
        for stop in self.stopping.stops.values():
            self._discretise(stop)
        self.supernet.model.load_state_dict(checkpoint.weights)
        self.model = prepare_model(self.accelerator, self.supernet.model)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.epoch = state["epoch"]
        self.history = state["history"]
        self.trajectory = state["trajectory"]
        self.stopped_alphas = state["stopped_alphas"]
        if self.cost is not None:
            self.cost.multiplier = state["cost_multiplier"]
