"""Triton's kernels, compiled before the first step instead of one by one during it."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from tqdm import tqdm

from metapool_kernels.dispatch import BACKENDS


def _takes_triton(device: torch.device) -> bool:
    return device.type == "cuda" and BACKENDS["triton"](torch.empty(0, device=device)) is None


def compile_ahead(step: Callable[[], object], accelerator: Accelerator) -> int:
    """Compile what ``step`` will call, with all cores; a bar says so.

    Of the processes of a machine one compiles, and the others take from its disk what it made.

    Args:
        step: a step of the search that leaves everything as it was. It runs once, without kernels:
            what it computes is worthless.
        accelerator: where it runs. Elsewhere than on a GPU with Triton there is nothing to do.

    Returns:
        How many kernels that were. Those that Triton has on disk take no time.
    """
    if not _takes_triton(accelerator.device):
        return 0
    from metapool_kernels._triton.ahead import compile_starts, recorded  # which imports Triton

    with recorded() as starts:
        step()
    hidden = None if accelerator.is_main_process else True
    with (
        accelerator.local_main_process_first(),
        tqdm(desc="compiling kernels", unit=" kernels", disable=hidden) as bar,
    ):

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return compile_starts(starts, tell=tell)
