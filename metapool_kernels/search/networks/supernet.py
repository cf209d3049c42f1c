"""The supernet: a network whose enhancers still mix their candidates, or already do not."""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.backbone import TEACHER, Backbone
from metapool_kernels.search.networks.surgery import Site, find_sites, insert_enhancers
from metapool_kernels.search.settings.config import ModelConfig

ALPHA = ".enhancer.pool.alpha"
"""What follows a layer's name in that of its architecture parameters."""

OF_CANDIDATES = (
    ALPHA,
    *(f".enhancer.pool.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
)
"""The same, and the statistics of poolings that are normalised: what has an entry for each."""


class Supernet:
    """A network with an enhancer in every layer, and which of its parameters are which.

    The alphas never require gradients: the search puts tensors that do in their place
    (:mod:`metapool_kernels.search.training.stateless`), so whatever trains the network leaves them
    alone.

    Attributes:
        model: the network itself.
        sites: where the enhancers are, in the order in which the network runs.
        config: what each layer chooses from.
        candidate_names: the same in the order of alpha: the poolings, then the extra candidates.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], config: ModelConfig) -> None:
        """Put an enhancer behind each site of ``model``, in place.

        Raises:
            ValueError: a candidate that there is not, or that is named twice.
        """
        if len(set(config.candidates)) < len(config.candidates):
            raise ValueError(
                f"the list of candidates names one twice: {', '.join(config.candidates)}"
            )
        self.model = model
        self.sites = list(sites)
        self.config = config
        self.candidate_names = (*config.candidates, *config.extra_candidates)
        self._enhancers = insert_enhancers(
            model,
            sites,
            config.candidates,
            extra_candidates=config.extra_candidates,
            count_include_pad=config.count_include_pad,
            candidate_norm=config.candidate_norm,
        )
        for site in sites:
            self.alpha(site.name).requires_grad_(False)

    def alpha(self, layer: str) -> nn.Parameter:
        """Architecture parameters of one layer, one for each candidate that is left."""
        return meta_pool(self._enhancers[layer]).alpha

    def alphas(self, layers: Sequence[str]) -> list[nn.Parameter]:
        """Architecture parameters of some layers."""
        return [self.alpha(layer) for layer in layers]

    def alpha_name(self, layer: str) -> str:
        """Name of one layer's architecture parameters in ``model.named_parameters()``."""
        return f"{layer}{ALPHA}"

    def probabilities(self, layers: Sequence[str]) -> dict[str, list[float]]:
        """Present weight of each candidate that is left, in the order of alpha, by layer."""
        if not layers:
            return {}
        weights = [meta_pool(self._enhancers[layer]).weights().detach() for layer in layers]
        # All at once: a GPU is waited for whenever numbers are fetched.
        numbers = iter(torch.cat(weights).tolist())
        return {
            layer: list(islice(numbers, len(of_layer)))
            for layer, of_layer in zip(layers, weights, strict=True)
        }

    def choice(self, layer: str) -> list[str]:
        """The candidates that are left, best first, but for any whose weight is 0."""
        return [name for name, _ in self._ranking(layer)]

    def choice_weights(self, layer: str) -> list[float]:
        """Present weight of each of :meth:`choice`."""
        return [weight for _, weight in self._ranking(layer)]

    def _ranking(self, layer: str) -> list[tuple[str, float]]:
        pool = meta_pool(self._enhancers[layer])
        weights = pool.weights().tolist()
        pairs = zip(pool.candidate_names, weights, strict=True)
        return sorted((pair for pair in pairs if pair[1] > 0), key=lambda pair: -pair[1])

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: all that requires gradients, so no alpha."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def discretise(self, layer: str, keep: Sequence[int]) -> list[nn.Parameter]:
        """Leave only the candidates at the positions ``keep``, renormalised and fixed.

        Of those that stay, the poolings come first in alpha, then the extra candidates.

        Returns:
            The weights of extra candidates that the network has lost by it.
        """
        enhancer = self._enhancers[layer]
        before = list(enhancer.parameters())
        dropped_alpha = self.alpha(layer)
        enhancer.reduce(keep)
        left = {id(parameter) for parameter in (*enhancer.parameters(), dropped_alpha)}
        return [parameter for parameter in before if id(parameter) not in left]

    def settle(self, layer: str) -> None:
        """Leave :meth:`choice` alone, in its order, which is that of the derived network."""
        names = meta_pool(self._enhancers[layer]).candidate_names
        self.discretise(layer, [names.index(name) for name in self.choice(layer)])


def build_supernet(
    backbone: Backbone,
    config: ModelConfig,
    seed: int,
    initial: Mapping[str, Tensor] | None = None,
) -> Supernet:
    """That of a backbone; the initial weights and alphas depend on ``seed`` and ``initial`` alone.

    Args:
        backbone: the network without enhancers.
        config: where the enhancers go, what they choose from, and the file with initial weights,
            if any.
        seed: of what is drawn.
        initial: tensors to begin with, by the names in :attr:`Supernet.model`; all but
            :data:`OF_CANDIDATES`.

    Raises:
        UserError: no such model, or the pattern finds no place for an enhancer, or no such
            candidate, or initial weights that do not fit.
    """
    if not config.candidates:
        raise UserError("model.candidates is empty; give at least one pooling")
    model = backbone.build(seed)
    if config.weights not in (None, TEACHER):
        backbone.load_initial_weights(model, config.weights)
    sites = find_backbone_sites(backbone, model, config)
    try:
        supernet = Supernet(model, sites, config)
    except ValueError as error:
        raise UserError(f"model.candidates: {error}") from error
    if initial is not None:
        _load(model, initial)
    return supernet


def _load(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    own = {n: t for n, t in model.state_dict().items() if n.endswith(OF_CANDIDATES)}
    try:
        model.load_state_dict({**own, **initial})
    except RuntimeError as error:
        raise UserError(f"the initial weights do not fit the supernet: {error}") from error


def find_backbone_sites(backbone: Backbone, model: nn.Module, config: ModelConfig) -> list[Site]:
    """:func:`metapool_kernels.search.networks.surgery.find_sites` on an image of zeros.

    Raises:
        UserError: no site, an unusable one, or images that the network cannot take.
    """
    example = torch.zeros(1, *backbone.image_shape)
    try:
        return find_sites(model, config.insert_after, example, type_name=config.insert_after_type)
    except ValueError as error:
        raise UserError(f"model.insert_after: {error}") from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{backbone.name!r} cannot take images of {backbone.image_shape}: {error}"
        ) from error


def meta_pool(enhancer: SpatialEnhancer) -> MetaPool2d:
    """The pooling inside an enhancer."""
    assert isinstance(enhancer.pool, MetaPool2d)
    return enhancer.pool
