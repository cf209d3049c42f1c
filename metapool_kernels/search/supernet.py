"""The supernet: a backbone whose enhancers still mix their candidates, or already do not."""

from collections.abc import Sequence

from torch import nn

from metapool_kernels import MetaPool2d, SpatialEnhancer
from metapool_kernels.search.backbone import Backbone, find_backbone_sites
from metapool_kernels.search.config import ModelConfig
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.surgery import insert_enhancers


class Supernet:
    """A backbone with an enhancer in every layer, and which of its parameters are which.

    Attributes:
        model: the network itself.
        sites: where the enhancers are, in the order in which the network runs.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, seed: int) -> None:
        """Build it; the initial weights and alphas depend on ``seed`` alone.

        Raises:
            UserError: no such model, or the pattern finds no place for an enhancer, or no such
                candidate.
        """
        self.model = backbone.build(seed)
        self.sites = find_backbone_sites(backbone, self.model, config.insert_after)
        try:
            self._enhancers = insert_enhancers(
                self.model,
                self.sites,
                config.candidates,
                count_include_pad=config.count_include_pad,
            )
        except ValueError as error:
            raise UserError(f"model.candidates: {error}") from error

    def alpha(self, layer: str) -> nn.Parameter:
        """Architecture parameters of one layer, shape (K,)."""
        return meta_pool(self._enhancers[layer]).alpha

    def alphas(self, layers: Sequence[str]) -> list[nn.Parameter]:
        """Architecture parameters of some layers."""
        return [self.alpha(layer) for layer in layers]

    def probabilities(self, layers: Sequence[str]) -> dict[str, list[float]]:
        """Present weight of each candidate, by layer."""
        return {
            layer: meta_pool(self._enhancers[layer]).weights().detach().tolist() for layer in layers
        }

    def weights(self) -> list[nn.Parameter]:
        """All parameters but the alphas."""
        alphas = {self.alpha(site.name) for site in self.sites}
        return [parameter for parameter in self.model.parameters() if parameter not in alphas]

    def discretise(self, layer: str, keep: Sequence[int]) -> None:
        """Leave only the candidates at the positions ``keep``, renormalised and fixed."""
        self._enhancers[layer].reduce(keep)
        self.alpha(layer).requires_grad_(False)


def meta_pool(enhancer: SpatialEnhancer) -> MetaPool2d:
    """The pooling inside an enhancer."""
    assert isinstance(enhancer.pool, MetaPool2d)
    return enhancer.pool
