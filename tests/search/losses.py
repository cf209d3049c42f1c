"""What the search minimises, of batches that a test has."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from metapool_kernels.search.data.splits import Batch
from metapool_kernels.search.training.objective import NetworkLoss
from metapool_kernels.search.training.steps import batch_loss


def loss_of(batch: Batch, **how: Any) -> NetworkLoss:
    """Cross entropy and accuracy, in the precision of the tensors unless ``autocast`` is given."""
    return partial(
        batch_loss, batch=batch, **{"label_smoothing": 0.0, "autocast": nullcontext, **how}
    )
