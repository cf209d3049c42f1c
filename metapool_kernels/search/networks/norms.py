"""Statistics of what normalises, measured anew."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.swa_utils import update_bn

from metapool_kernels import NormalizedMetaPool2d


def measure_norms(batches: Iterable[Any], network: nn.Module) -> None:
    """Running statistics become the means over ``batches``, in place.

    Those of BatchNorm as :func:`torch.optim.swa_utils.update_bn` has them, and those of poolings
    that are normalised before they are weighted, which it does not know.
    """
    pools = [module for module in network.modules() if isinstance(module, NormalizedMetaPool2d)]
    momenta = [pool.momentum for pool in pools]
    for pool in pools:
        pool.reset_running_stats()
        pool.momentum = None
    try:
        update_bn(batches, network)
    finally:
        for pool, momentum in zip(pools, momenta, strict=True):
            pool.momentum = momentum
