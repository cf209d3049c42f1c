"""``python -m benches.pyramid``: spatial pyramid pooling (skip, max 5, 9, 13 side by side).

Ours beside what YOLO networks do (three nested windows of 5, then ``cat``), the same with each
window as two strips, the windows as they stand, and a mere ``cat`` of four times x, which moves the
same bytes and computes nothing. Each in both layouts, in turn. Writes ``pyramid.json`` and ``.md``
under ``benches/results/``; two minutes.
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
from metapool_kernels import fused_multi_pool
from tests.cases import CANDIDATES

Pyramid = Callable[[Tensor], Tensor]
SIZES = ((8, 256, 20, 20), (2, 256, 40, 40))
COPY = "cat of x alone"


def strips(x: Tensor) -> Tensor:
    """A window of 5 x 5 as two strips."""
    return F.max_pool2d(F.max_pool2d(x, (1, 5), 1, (0, 2)), (5, 1), 1, (2, 0))


def _nested(pool: Pyramid) -> Pyramid:
    def run(x: Tensor) -> Tensor:
        maps = [x]
        for _ in range(3):
            maps.append(pool(maps[-1]))
        return torch.cat(maps, 1)

    return run


PYRAMIDS: dict[str, Pyramid] = {
    "ours": lambda x: fused_multi_pool(x, CANDIDATES["pyramid"]),
    "nested 5x5": _nested(lambda x: F.max_pool2d(x, 5, 1, 2)),
    "nested strips": _nested(strips),
    "windows as they are": lambda x: torch.cat(
        [x, *(F.max_pool2d(x, side, 1, side // 2) for side in (5, 9, 13))], 1
    ),
    COPY: lambda x: torch.cat([x, x, x, x], 1),
}


def make_step(pyramid: Pyramid, mode: str, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: the output, and with backward the gradient of x too."""
    if mode == "forward":
        return lambda: (pyramid(x),)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    form = LAYOUTS["channels_last" if x.stride(1) == 1 else "NCHW"]
    rng = torch.Generator().manual_seed(1)
    n, c, h, w = x.shape
    grad_out = torch.randn(n, 4 * c, h, w, generator=rng).to(x.dtype).contiguous(memory_format=form)

    def both() -> tuple[Tensor, ...]:
        out = pyramid(leaf)
        return (out.detach(), *torch.autograd.grad(out, leaf, grad_out))

    return both


def inputs(size: tuple[int, ...], layout: str) -> Tensor:
    """Distinct numbers, so that nested windows choose as wide ones do."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=rng)
    return x.contiguous(memory_format=LAYOUTS[layout])


def check(size: tuple[int, ...], layout: str) -> None:
    """Raise AssertionError where a pyramid differs from the windows as they are."""
    x = inputs(size, layout)
    right = make_step(PYRAMIDS["windows as they are"], MODES[1], x)()
    for name, pyramid in PYRAMIDS.items():
        if name != COPY:
            for got, expected in zip(make_step(pyramid, MODES[1], x)(), right, strict=True):
                torch.testing.assert_close(
                    got, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
                )


def measure(effort: Effort) -> list[dict[str, Any]]:
    """A row for each size and mode: medians in ms of every pyramid in both layouts."""
    rows = []
    for size in SIZES:
        for layout in LAYOUTS:
            check(size, layout)
        for mode in MODES:
            rows.append({"size": size, "mode": mode, "ms": _times(size, mode, effort)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _times(size: tuple[int, ...], mode: str, effort: Effort) -> dict[str, float]:
    return medians(
        PYRAMIDS,
        lambda name, layout: make_step(PYRAMIDS[name], mode, inputs(size, layout)),
        effort,
    )


def markdown(about: Mapping[str, str], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The report."""
    yield "# Spatial pyramid pooling\n"
    yield "Made by `python -m benches.pyramid`. Identity and maxima of 5x5, 9x9 and 13x13 side by"
    yield "side, float32; medians in milliseconds, all measured in turn.\n"
    yield from (f"- {name}: {text}" for name, text in about.items())
    for row in rows:
        yield f"\n## {' x '.join(map(str, row['size']))}, {row['mode']}\n"
        yield from beside_ours(row["ms"], digits=2)


def main() -> None:
    """Command line."""
    about = conditions(keep_memory())
    rows = measure(Effort(seconds=12, least=5, most=40))
    write("pyramid", about, rows, markdown(about, rows))


if __name__ == "__main__":
    main()
