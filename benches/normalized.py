"""``python -m benches.normalized``: the mixed operation of DARTS, with a norm behind each pooling.

Ours beside what searches do (each pooling, its BatchNorm2d without affine parameters, a weighted
sum), and the mixtures without norms of both. In training, seven candidates, padding not counted.
Each in both layouts, in turn. Writes ``normalized.json`` and ``.md`` under ``benches/results/``;
two minutes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.conditions import conditions
from benches.layouts import LAYOUTS, MODES, beside_ours, medians, write
from benches.timing import Effort, keep_memory
from metapool_kernels import DEFAULT_CANDIDATES, fused_meta_pool, fused_normalized_meta_pool
from metapool_kernels.candidates import Kind, parse_candidates
from metapool_kernels.reference import pool

Mixture = Callable[[Tensor, Tensor], Tensor]
SIZE = (32, 96, 56, 56)


def _eager(normalizes: bool) -> Mixture:
    def run(x: Tensor, alpha: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        weights = torch.softmax(alpha, -1)
        for weight, candidate in zip(weights, parse_candidates(DEFAULT_CANDIDATES), strict=True):
            pooled = pool(x, candidate, (1, 1), count_include_pad=False)
            if normalizes and candidate.kind is not Kind.SKIP:
                pooled = F.batch_norm(pooled, None, None, training=True)
            total = total + weight * pooled
        return total

    return run


def _ours(x: Tensor, alpha: Tensor) -> Tensor:
    return fused_normalized_meta_pool(
        x, alpha, DEFAULT_CANDIDATES, training=True, count_include_pad=False
    )


MIXTURES: dict[str, Mixture] = {
    "ours": _ours,
    "poolings, BatchNorm2d, sum": _eager(normalizes=True),
    "our mixture without norms": lambda x, alpha: fused_meta_pool(
        x, alpha, count_include_pad=False
    ),
    "poolings, sum": _eager(normalizes=False),
}


def make_step(mixture: Mixture, mode: str, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: the output, and with backward the gradients of x and alpha too."""
    rng = torch.Generator().manual_seed(1)
    alpha = torch.randn(len(DEFAULT_CANDIDATES), generator=rng)
    if mode == "forward":
        return torch.no_grad()(lambda: (mixture(x, alpha),))
    grad_out = torch.empty_like(x).copy_(torch.randn(x.shape, generator=rng))
    leaves = x.detach().clone(memory_format=torch.preserve_format), alpha
    for leaf in leaves:
        leaf.requires_grad_()

    def both() -> tuple[Tensor, ...]:
        out = mixture(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return both


def inputs(size: tuple[int, ...], layout: str) -> Tensor:
    """What a ReLU6 leaves of noise: many elements are equal."""
    rng = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(size, generator=rng)).clamp(0, 6)
    return x.contiguous(memory_format=LAYOUTS[layout])


def check(size: tuple[int, ...], layout: str) -> None:
    """Raise AssertionError where ours differs from what it stands for."""
    x = inputs(size, layout)
    steps = [make_step(mixture, MODES[1], x)() for mixture in MIXTURES.values()]
    for ours, eager in (steps[:2], steps[2:]):
        for got, right in zip(ours, eager, strict=True):
            scale = right.abs().max().item()
            torch.testing.assert_close(got, right, rtol=0, atol=1e-4 * scale)


def measure(effort: Effort) -> list[dict[str, Any]]:
    """A row for each mode: medians in ms of every mixture in both layouts."""
    rows = []
    for layout in LAYOUTS:
        check((2, *SIZE[1:]), layout)
    for mode in MODES:
        rows.append({"mode": mode, "ms": _times(mode, effort)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _times(mode: str, effort: Effort) -> dict[str, float]:
    return medians(
        MIXTURES, lambda name, layout: make_step(MIXTURES[name], mode, inputs(SIZE, layout)), effort
    )


def markdown(about: Mapping[str, str], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The report."""
    yield "# Normalised mixture\n"
    yield "Made by `python -m benches.normalized`. Default candidates, padding not counted, each"
    yield f"pooling normalised in training, {' x '.join(map(str, SIZE))} float32; medians in"
    yield "milliseconds, all measured in turn.\n"
    yield from (f"- {name}: {text}" for name, text in about.items())
    for row in rows:
        yield f"\n## {row['mode']}\n"
        yield from beside_ours(row["ms"], digits=1)


def main() -> None:
    """Command line."""
    about = conditions(keep_memory())
    rows = measure(Effort(seconds=40, least=5, most=40))
    write("normalized", about, rows, markdown(about, rows))


if __name__ == "__main__":
    main()
