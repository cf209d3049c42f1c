"""The kernels in Triton. Imported when a call is first sent here, never by the package itself."""

from metapool_kernels._triton.launch import meta_pool_bwd, meta_pool_fwd

__all__ = ["meta_pool_bwd", "meta_pool_fwd"]
