"""The search as an object that any training loop can hold: it owns alphas, tasks and stops."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from metapool_kernels import DEFAULT_CANDIDATES, SpatialEnhancer
from metapool_kernels.convertible import to_plain
from metapool_kernels.search import optimizers
from metapool_kernels.search.backbone import Backbone
from metapool_kernels.search.bilevel import (
    Hypergradient,
    draw_tasks,
    hypergradient,
    importances,
)
from metapool_kernels.search.collective import mean_over_processes, on_main
from metapool_kernels.search.config import (
    AlphaConfig,
    CostConfig,
    ModelConfig,
    SearchConfig,
    StopConfig,
)
from metapool_kernels.search.cost_table import CostTable
from metapool_kernels.search.expected_cost import ExpectedCost
from metapool_kernels.search.objective import NetworkLoss, explained, network_objective, scaled
from metapool_kernels.search.optimizers import forget, make_alpha_optimizer
from metapool_kernels.search.stopping import ProgressiveStopping, Stop, phases
from metapool_kernels.search.supernet import Supernet, meta_pool
from metapool_kernels.search.surgery import find_sites, image_shape


class PoolingSearch:
    """Enhancers in a network, and all that is searched about them; the loop stays the user's.

    Args:
        model: any network, on the device where it trains; gets its enhancers in place, before
            DistributedDataParallel or ``torch.compile`` take it.
        example: input for one forward pass, such as zeros of shape (1, C, H, W); a tuple holds
            several arguments, a dict those by name.
        after: regular expression for the whole names of the modules that enhancers follow.
        epochs: of the whole search; warm-up and deadline are shares of them.
        after_type: name of a class; of the modules that match, only those of this class.
        candidates, extra_candidates, count_include_pad, candidate_norm: as for
            :func:`metapool_kernels.search.surgery.add_enhancers`.
        warmup: share of the epochs, at the start, in which alpha stays as it is.
        progressive: False keeps every layer open to the deadline.
        alpha: how alpha is trained: the method, tasks, Adam.
        stop: when a layer is fixed.
        table: what the candidates cost, see ``metapool cost``.
        cost: what that weighs.
        seed: of the tasks.

    Attributes:
        supernet: the network, and where its alphas are.
        stopping: which layers are open, and the :class:`Stop` of each other.
        epoch: how many have ended.
        step: how many steps of alpha there have been; its tasks are drawn by seed and step.
        trajectory: the open layers' probabilities, at the start and after each epoch.
        history: the numbers of each epoch.

    Raises:
        ValueError: there is no place for an enhancer, or no such candidate, or the network does
            not run on ``example``.
        UserError: the schedule, the table or the budget does not work.

    The alphas require no gradients and are left with none, so an optimizer of all parameters of
    ``model`` never moves them. Layers that stop get alphas of another size: what notes shapes, such
    as an average of the weights, has to be made anew then; ``torch.compile`` compiles again.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        after: str,
        *,
        epochs: int,
        after_type: str | None = None,
        candidates: Sequence[str] = DEFAULT_CANDIDATES,
        extra_candidates: Sequence[str] = (),
        count_include_pad: bool = True,
        candidate_norm: bool = False,
        warmup: float = 0.1,
        progressive: bool = True,
        alpha: AlphaConfig | None = None,
        stop: StopConfig | None = None,
        table: CostTable | None = None,
        cost: CostConfig | None = None,
        seed: int = 0,
    ) -> None:
        settings = SearchConfig(
            epochs=epochs,
            warmup=warmup,
            progressive=progressive,
            alpha=alpha or AlphaConfig(),
            stop=stop or StopConfig(),
            cost=cost or CostConfig(),
        )
        phases(settings)  # refused before anything changes
        name = f"{type(model).__module__}:{type(model).__qualname__}"
        backbone = Backbone(name, {}, keep_dilation=True, image_shape=image_shape(example))
        config = ModelConfig(
            insert_after=after,
            insert_after_type=after_type,
            candidates=list(candidates),
            extra_candidates=list(extra_candidates),  # type: ignore[arg-type]  # checked by surgery
            count_include_pad=count_include_pad,
            candidate_norm=candidate_norm,
        )
        try:
            sites = find_sites(model, after, example, type_name=after_type)
        except ValueError:
            raise
        except Exception as error:  # a network raises what it likes
            raise ValueError(
                f"the network does not run on the example: {error}; give what it is called with, "
                "on its device: a tuple for several arguments, a dict for those by name"
            ) from error
        self._begin(Supernet(model, sites, config), backbone, settings, seed, table)

    @classmethod
    def over(
        cls,
        supernet: Supernet,
        backbone: Backbone,
        settings: SearchConfig,
        *,
        seed: int = 0,
        table: CostTable | None = None,
    ) -> "PoolingSearch":
        """The search of a network that has its enhancers already, and was ``backbone`` before."""
        search = cls.__new__(cls)
        search._begin(supernet, backbone, settings, seed, table)
        return search

    def _begin(
        self,
        supernet: Supernet,
        backbone: Backbone,
        settings: SearchConfig,
        seed: int,
        table: CostTable | None,
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

    def alpha_step(
        self,
        validation: NetworkLoss,
        inner: NetworkLoss | None = None,
        *,
        xi: float | None = None,
        scale: float = 1.0,
    ) -> Tensor | None:
        """Move alpha by one step; weights and buffers stay, bit for bit, as they are.

        In every process, each with batches of its own: their gradients are averaged.

        Args:
            validation: the loss of a network on a batch that trains alpha and never the weights.
                It is called with a network that computes with other tensors than ``model``, and
                has to compute with that, in any precision.
            inner: the same on a training batch, for every method but ``first-order``.
            xi: size of the step of the weights in these methods, if ``alpha.xi`` is not set: the
                learning rate.
            scale: multiplies losses before gradients are taken, which are divided by it: without
                one they would vanish in float16. ``scaler.get_scale()`` of a GradScaler, which is
                for the weights alone otherwise. With one, no step is taken that is not finite.

        Returns:
            The loss, or None where nothing is learned: in the warm-up, and when all have stopped.

        Raises:
            ValueError: the method needs ``inner`` or ``xi``.
        """
        loss = None
        if self.learns_alpha:
            loss = self.move([self.gradient(validation, inner, xi=xi, scale=scale)], scale != 1)
            self._losses.append(loss)
        self.step += 1
        return loss

    def gradient(
        self,
        validation: NetworkLoss,
        inner: NetworkLoss | None = None,
        *,
        xi: float | None = None,
        scale: float = 1.0,
    ) -> Hypergradient:
        """What :meth:`alpha_step` moves along, for :meth:`move`; of several their mean counts."""
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
            validation: for the rule ``perturbation``: losses as for :meth:`alpha_step`, at most
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

    def cycle(self, loader: "DataLoader[Any]") -> Iterator[Any]:
        """The loader's batches without end, in an order of their own in each round.

        Begins anew with each call, so that an epoch needs to know of none before it: let the loader
        shuffle, or what lies beyond the length of an epoch is never seen.

        Raises:
            ValueError: the loader is empty.
        """
        for passed in count():
            # Of DistributedSampler, whose order is the same until it is told the epoch.
            tell = getattr(getattr(loader, "sampler", None), "set_epoch", None)
            if tell is not None:
                tell(self.epoch + passed * self.settings.epochs)
            batch = None
            for batch in loader:
                yield batch
            if batch is None:
                raise ValueError("the loader gives no batch; it may drop its last, and only, one")

    def derive(self) -> nn.Module:
        """A copy in plain torch modules: of each layer what it keeps, while it is open the best.

        Raises:
            NotImplementedError: as for :func:`metapool_kernels.convertible.to_plain`.
        """
        derived = copy.deepcopy(self.supernet.model)
        for layer in self.stopping.open_layers:
            enhancer = derived.get_submodule(f"{layer}.enhancer")
            assert isinstance(enhancer, SpatialEnhancer)
            enhancer.reduce([int(meta_pool(enhancer).weights().argmax())])
        return to_plain(derived)

    def save(self, folder: str | Path) -> None:
        """Write what :meth:`load` goes on from; in every process, of which the first writes.

        ``checkpoint/`` has the network's tensors and :meth:`state_dict`, ``metrics.csv`` the
        :attr:`history`, ``probabilities.json`` the :attr:`trajectory`; once all layers have
        stopped ``architecture.json`` and ``report.html`` say what was found. The state of the
        loop (optimizer, schedule, scaler, random numbers) is the loop's to save. Files are written
        whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        from metapool_kernels.search.saved import save  # pictures take a second to import

        on_main(lambda: save(self, folder))

    @staticmethod
    def load(folder: str | Path, model: nn.Module) -> "PoolingSearch":
        """The search that was saved, to go on with exactly as it was.

        Args:
            folder: of :meth:`save`.
            model: a network as the search was begun with, without enhancers; it gets those that
                there were, and all tensors. Make the optimizer after that, and load its state.

        Raises:
            UserError: there is no search, or it is damaged, or of another network.
        """
        from metapool_kernels.search.saved import load

        return load(folder, model)

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
