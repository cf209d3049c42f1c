"""What several processes do together, by ``torch.distributed`` alone; without it there is one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metapool_kernels.search.errors import ToldError, UserError

T = TypeVar("T")


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that decides and writes."""
    return not _together() or dist.get_rank() == 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_main(action: Callable[[], T]) -> T:
    """Do something in the main process only, and hand its result to all.

    Raises:
        UserError: in all processes, if it was raised in the main one.
    """
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(action(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    if _together():
        dist.broadcast_object_list(outcome)
    result, message = outcome[0]
    if message is not None:
        raise (UserError if is_main() else ToldError)(message)
    return result  # type: ignore[return-value]  # T may itself be None


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor, averaged over the processes, all in one message."""
    if not tensors or process_count() == 1:
        return list(tensors)
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / process_count()).split(sizes)
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
