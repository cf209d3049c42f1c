"""Fused candidate pooling for PyTorch: all poolings of a search space in one pass, mixed or side by
side.

Start at :func:`metapool_kernels.fused_meta_pool`; the modules around it are
:class:`metapool_kernels.MetaPool2d` and :class:`metapool_kernels.SpatialEnhancer`. Poolings side by
side are :func:`metapool_kernels.fused_multi_pool` and :class:`metapool_kernels.MultiPool2d`;
normalised before they are mixed, as DARTS has them,
:func:`metapool_kernels.fused_normalized_meta_pool` and
:class:`metapool_kernels.NormalizedMetaPool2d`.
"""

from metapool_kernels.candidates import DEFAULT_CANDIDATES, pool_candidates
from metapool_kernels.functional import (
    fused_meta_pool,
    fused_multi_pool,
    fused_normalized_meta_pool,
)
from metapool_kernels.nn import (
    MetaPool2d,
    MultiPool2d,
    NormalizedMetaPool2d,
    SpatialEnhancer,
)
from metapool_kernels.version import __version__

__all__ = [
    "DEFAULT_CANDIDATES",
    "MetaPool2d",
    "MultiPool2d",
    "NormalizedMetaPool2d",
    "SpatialEnhancer",
    "__version__",
    "fused_meta_pool",
    "fused_multi_pool",
    "fused_normalized_meta_pool",
    "pool_candidates",
]
