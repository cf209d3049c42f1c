"""The kernels in Triton. Imported when a call is first sent here, never by the package itself."""

from metapool_kernels._triton.launch import (
    affine_bwd,
    affine_fwd,
    meta_pool_bwd,
    meta_pool_fwd,
    pool_moments,
    pool_products,
)

__all__ = [
    "affine_bwd",
    "affine_fwd",
    "meta_pool_bwd",
    "meta_pool_fwd",
    "pool_moments",
    "pool_products",
]
