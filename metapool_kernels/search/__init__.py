"""Progressive Meta-Pooling Learning: search the pooling of every layer, then derive a network.

The command line is ``metapool`` (:mod:`metapool_kernels.search.cli`); the search itself is
:mod:`metapool_kernels.search.training.loop`. Needs the extra ``search``. Importing
:mod:`metapool_kernels` loads nothing of this.
"""
