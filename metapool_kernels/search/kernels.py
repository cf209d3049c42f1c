"""Triton's kernels, compiled before the first step instead of one by one during it."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from metapool_kernels.dispatch import BACKENDS


def _takes_triton(device: torch.device) -> bool:
    return device.type == "cuda" and BACKENDS["triton"](torch.empty(0, device=device)) is None


def compile_ahead(step: Callable[[], object], device: torch.device, *, show: bool = True) -> int:
    """Compile what ``step`` will call, with all cores; a bar says so.

    Args:
        step: a step of the search that leaves everything as it was. It runs once, without kernels:
            what it computes is worthless.
        device: where it runs. Elsewhere than on a GPU with Triton there is nothing to do.
        show: whether there is a bar.

    Returns:
        How many kernels that were. Those that Triton has on disk take no time.
    """
    if not _takes_triton(device):
        return 0
    from metapool_kernels._triton.ahead import compile_starts, recorded  # which imports Triton

    with recorded() as starts:
        step()
    with tqdm(desc="compiling kernels", unit=" kernels", disable=None if show else True) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return compile_starts(starts, tell=tell)
