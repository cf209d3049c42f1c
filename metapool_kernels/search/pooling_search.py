"""The search as an object that any training loop can hold."""

import copy
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from metapool_kernels import DEFAULT_CANDIDATES, SpatialEnhancer
from metapool_kernels.convertible import to_plain
from metapool_kernels.search.machine.collective import on_main
from metapool_kernels.search.method.stopping import phases
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import Supernet, meta_pool
from metapool_kernels.search.networks.surgery import find_sites, image_shape
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.settings.config import (
    AlphaConfig,
    CostConfig,
    ModelConfig,
    SearchConfig,
    StopConfig,
)
from metapool_kernels.search.training.objective import NetworkLoss
from metapool_kernels.search.training.upper_level import UpperLevel


class PoolingSearch(UpperLevel):
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
            :func:`metapool_kernels.search.networks.surgery.add_enhancers`.
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
        super().__init__(Supernet(model, sites, config), backbone, settings, seed=seed, table=table)

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

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> "PoolingSearch":
        """The search that was saved, to go on with exactly as it was.

        Args:
            folder: of :meth:`save`.
            model: a network as the search was begun with, without enhancers; it gets those that
                there were, and all tensors. Make the optimizer after that, and load its state.

        Raises:
            UserError: there is no search, or it is damaged, or of another network.
        """
        from metapool_kernels.search.saved import begin_again

        search = cls.__new__(cls)
        begin_again(search, folder, model)
        return search
