"""The upper level of a search: alphas, tasks, stops and costs, without a training loop."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metapool_kernels.search.machine.collective import mean_over_processes, on_main
from metapool_kernels.search.method.bilevel import (
    Hypergradient,
    draw_tasks,
    hypergradient,
    importances,
)
from metapool_kernels.search.method.expected_cost import ExpectedCost
from metapool_kernels.search.method.stopping import ProgressiveStopping, Stop, phases
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import Supernet
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.settings.config import SearchConfig
from metapool_kernels.search.training import optimizers
from metapool_kernels.search.training.objective import (
    NetworkLoss,
    explained,
    network_objective,
    scaled,
)
from metapool_kernels.search.training.optimizers import forget, make_alpha_optimizer


class UpperLevel:
    """Everything of a search that changes, but the tensors of the network and what trains them.

    Args:
        supernet: a network with its enhancers.
        backbone: what the network was before.
        settings: of the search; those of the weights are not read.
        seed: of the tasks.
        table: what the candidates cost.

    Attributes:
        stopping: which layers are open, and the :class:`Stop` of each other.
        epoch: how many have ended.
        step: how many steps of alpha there have been; its tasks are drawn by seed and step.
        trajectory: the open layers' probabilities, at the start and after each epoch.
        history: the numbers of each epoch.
        stopped_alphas: of each layer that has stopped, what they were then.

    Raises:
        UserError: the schedule, the table or the budget does not work.
    """

    def __init__(
        self,
        supernet: Supernet,
        backbone: Backbone,
        settings: SearchConfig,
        *,
        seed: int = 0,
        table: CostTable | None = None,
    ) -> None:
        self.supernet = supernet
        self.backbone = backbone
        self.settings = settings
        self.seed = seed
        self.layers = [site.name for site in supernet.sites]
        self.warmup, self.deadline = phases(settings)
        self.table = table
        if table is not None:
            names = supernet.candidate_names
            self.table = table.fitted("the cost table", None, supernet.sites, names)
        self.begin_training()
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.trajectory = [supernet.probabilities(self.layers)]
        self.stopped_alphas: dict[str, list[float]] = {}
        self._losses: list[Tensor] = []

    def begin_training(self) -> None:
        """Make anew all that notes the steps of alpha, as after one that is taken back."""
        settings = self.settings
        self.stopping = ProgressiveStopping(
            self.layers, settings.stop, deadline=self.deadline, progressive=settings.progressive
        )
        self.alpha_optimizer = make_alpha_optimizer(
            self.supernet.alphas(self.layers), settings.alpha
        )
        self.cost = None
        if self.table is not None:
            costs = self.table.relative(self.supernet.candidate_names)
            self.cost = ExpectedCost(costs, settings.cost, settings.alpha.lr)

    @property
    def learns_alpha(self) -> bool:
        """Whether the warm-up is over, and a layer open."""
        return self.epoch >= self.warmup and bool(self.stopping.open_layers)

    def gradient(
        self,
        validation: NetworkLoss,
        inner: NetworkLoss | None = None,
        *,
        xi: float | None = None,
        scale: float = 1.0,
    ) -> Hypergradient:
        """The gradient of a step of alpha, for :meth:`move`, which takes the mean of several.

        Args:
            validation: the loss on a batch of the alpha half, and anything beside it.
            inner: the same on a batch of the weight half, for every method but ``first-order``.
            xi: size of the step of the weights, where the settings have none.
            scale: multiplies losses before gradients are taken, which are divided by it.

        Raises:
            ValueError: the method needs ``inner`` or ``xi``, or a loss does not depend on alpha.
        """
        settings = self.settings.alpha
        xi = xi if settings.xi is None else settings.xi
        if settings.method != "first-order" and inner is None:
            raise ValueError(
                f"method {settings.method} takes a step of the weights: give the loss of that, "
                "inner=lambda net: ..."
            )
        if settings.method != "first-order" and xi is None:
            raise ValueError(
                f"method {settings.method} takes a step of the weights: give its size, "
                'xi=optimizer.param_groups[0]["lr"] or AlphaConfig(xi=...)'
            )
        layers = self.stopping.open_layers
        weights = self.supernet.weights()
        objective = network_objective(
            self.supernet.model, list(weights), [self.supernet.alpha_name(n) for n in layers]
        )
        candidates = len(self.supernet.candidate_names)
        with torch.enable_grad(), explained():
            found = hypergradient(
                objective,
                list(weights.values()),
                self.supernet.alphas(layers),
                scaled(inner or validation, scale),
                scaled(validation, scale),
                method=settings.method,
                xi=(xi or 0.0) / scale,  # of a gradient that is so many times as large
                tasks=draw_tasks(candidates, settings.tasks, settings.tilt, [self.seed, self.step]),
                tilt=settings.tilt,
            )
        unscaled = [gradient / scale for gradient in found.gradients]
        return replace(found, gradients=unscaled, loss=found.loss / scale)

    def move(self, found: Sequence[Hypergradient], finite_only: bool = False) -> Tensor:
        """Move alpha along the mean of gradients, and return the mean of their losses."""
        alphas = self.supernet.alphas(self.stopping.open_layers)
        of_cost = None if self.cost is None else self.cost.step(alphas)
        loss = optimizers.alpha_step(
            alphas, self.alpha_optimizer, found, of_cost, finite_only=finite_only
        )
        self.stopping.update(self.supernet.probabilities(self.stopping.open_layers))
        return loss

    def end_epoch(
        self,
        validation: Iterable[NetworkLoss] = (),
        *,
        numbers: Mapping[str, Any] | None = None,
        optimizer: Optimizer | None = None,
    ) -> list[Stop]:
        """Fix the layers that are decided now, in every process what the main one decides.

        Args:
            validation: for the rule ``perturbation``: losses as for :meth:`gradient`, at most
                ``stop.batches`` of them, looked at only when the rule asks.
            numbers: of the epoch, for :attr:`history`.
            optimizer: of the weights, which then loses those of extra candidates that the network
                has lost. It works on without that too; but its state fits no later one, as after a
                break.

        Returns:
            What has been fixed. Wrap ``model`` in DistributedDataParallel anew then, if it has
            extra candidates or normalises poolings: it would wait for what is gone.

        Raises:
            ValueError: the rule ``perturbation`` has nothing to measure.
        """
        self.epoch += 1
        self.trajectory.append(self.supernet.probabilities(self.stopping.open_layers))
        measured = None
        if self.stopping.asks_for_importances(self.epoch):
            measured = self._importances(list(islice(validation, self.settings.stop.batches)))
        stops = on_main(lambda: self.stopping.check(self.epoch, measured))
        self.stopping.fix(stops)
        self._discretise(stops, optimizer)
        row = {"epoch": self.epoch, **(numbers or {})}
        row.setdefault("alpha_loss", self._mean_loss())
        row["stopped"] = len(self.stopping.stops)
        if self.cost is not None:
            row |= self.cost.numbers(self.supernet.alphas(self.stopping.open_layers))
        self.history.append(row)
        return stops

    def _mean_loss(self) -> float | None:
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean().item() if losses else None

    def _importances(self, losses: Sequence[NetworkLoss]) -> dict[str, list[float]]:
        """Of the open layers' candidates, over all processes.

        For the loss on the alpha half and the weighted cost: to leave out a dear one saves.
        """
        if not losses:
            raise ValueError(
                "the rule perturbation measures losses at the end of an epoch: give some, "
                "end_epoch(lambda net, b=b: loss(net, b) for b in validation)"
            )
        layers = self.stopping.open_layers
        alphas = self.supernet.alphas(layers)
        objective = network_objective(
            self.supernet.model, [], [self.supernet.alpha_name(layer) for layer in layers]
        )
        if self.cost is not None:
            objective = self.cost.beside(objective, alphas)
        means = mean_over_processes(importances(objective, [], alphas, losses))
        return {layer: mean.tolist() for layer, mean in zip(layers, means, strict=True)}

    def _discretise(self, stops: Iterable[Stop], optimizer: Optimizer | None) -> None:
        for stop in stops:
            alpha = self.supernet.alpha(stop.layer)
            forget(self.alpha_optimizer, alpha)
            self.stopped_alphas[stop.layer] = alpha.detach().tolist()
            if self.cost is not None:
                self.cost.settle(stop.layer, stop.keep)
            for weight in self.supernet.discretise(stop.layer, stop.keep):
                if optimizer is not None:
                    forget(optimizer, weight)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the network's tensors, in plain types and tensors."""
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "stopping": self.stopping.state_dict(),
            "stopped_alphas": self.stopped_alphas,
            "history": self.history,
            "trajectory": self.trajectory,
        }
        if self.cost is not None:
            state["cost_multiplier"] = self.cost.multiplier
        return state

    def load_state_dict(
        self, state: Mapping[str, Any], *, optimizer: Optimizer | None = None
    ) -> None:
        """Go on from :meth:`state_dict` in a search that was made alike.

        The network gets its structure of then, but not its tensors, which are to be loaded next.
        ``optimizer``, if it was made before, loses what the network loses.

        Raises:
            ValueError: layers have stopped that were open then.
        """
        before = self.stopping.stops.keys()
        self.stopping.load_state_dict(state["stopping"])
        if before - self.stopping.stops.keys():
            raise ValueError("layers have stopped that were open then; begin with a new network")
        stops = self.stopping.stops.values()
        self._discretise([stop for stop in stops if stop.layer not in before], optimizer)
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.epoch = state["epoch"]
        self.step = state.get("step", 0)  # a search of the command line sets it anew
        self.history = list(state["history"])
        self.trajectory = list(state["trajectory"])
        self.stopped_alphas = dict(state["stopped_alphas"])
        if self.cost is not None:
            self.cost.multiplier = state["cost_multiplier"]
