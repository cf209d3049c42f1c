"""Progressive Meta-Pooling Learning: search the pooling of every layer, then derive a network.

:class:`PoolingSearch` is the search in a training loop of one's own; the command line is
``metapool`` (:mod:`metapool_kernels.search.cli`), its loop
:mod:`metapool_kernels.search.training.loop`. Needs the extra ``search``. Importing
:mod:`metapool_kernels` loads nothing of this.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metapool_kernels.search.pooling_search import PoolingSearch

__all__ = ["PoolingSearch"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: the command line's help needs none of its libraries."""
    if name != "PoolingSearch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from metapool_kernels.search.pooling_search import PoolingSearch

    return PoolingSearch
