"""The report in Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benches.aims import Aim
from benches.cases import NO_CANDIDATES
from benches.figures import Roofline, Row
from benches.measure import Result
from benches.peers import PEERS
from benches.timing import Times


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, the first column to the left."""
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in body:
        yield "| " + " | ".join(row) + " |"


def milliseconds(times: Times) -> str:
    """Median [quartiles]."""
    median, q1, q3 = (
        f"{value * 1e3:.{3 if value < 1e-3 else 2 if value < 1e-1 else 0}f}"
        for value in (times.median, times.q1, times.q3)
    )
    return f"{median} [{q1}, {q3}]"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _layout(name: str) -> str:
    return name.removeprefix("ours").strip() or "NCHW"


def ours_table(rows: Iterable[Row]) -> Iterator[str]:
    """Ours against the copy and the peers, case by case."""
    head = ("case", "layout", "ours, ms", "copies", "x eager NCHW", "x best torch peer")
    yield from table(
        (*head, "best torch peer", "x OpenCV with mix", "without"),
        (
            (
                str(row.case),
                _layout(row.name),
                milliseconds(row.times),
                f"{row.copies:.1f}",
                _ratio(row.over_eager),
                _ratio(row.over_best),
                row.best or "",
                _ratio(row.over_opencv),
                _ratio(row.over_poolings),
            )
            for row in rows
        ),
    )


def peers_table(results: list[Result]) -> Iterator[str]:
    """Every time of every peer; what was withheld says so."""
    measured = {name for result in results for name in (*result.times, *result.withheld)}
    names = [name for name in PEERS if name in measured]

    def cell(result: Result, name: str) -> str:
        if name in result.withheld:
            return "withheld"
        return milliseconds(result.times[name]) if name in result.times else ""

    yield from table(
        ("case", *names),
        ([str(result.case), *(cell(result, name) for name in names)] for result in results),
    )
    for result in results:
        for name, reason in result.withheld.items():
            yield f"\nWithheld: {name}, {result.case}: {reason}."


def aims_table(aims: Iterable[Aim]) -> Iterator[str]:
    """What the op promises, and whether this run shows it."""
    yield from table(
        ("aim", "bound", "measured", "met"),
        ((aim.what, aim.bound, aim.measured, "yes" if aim.met else "**no**") for aim in aims),
    )


def roofline_table(rooflines: Iterable[Roofline]) -> Iterator[str]:
    """Bytes moved, speeds, and time per vector and thread."""
    head = ("case", "layout", "bytes per element", "copy, GB/s", "ours, GB/s", "share of copy")
    yield from table(
        (*head, "ns per vector", "cycles per vector"),
        (
            (
                str(line.case),
                _layout(line.name),
                str(line.bytes_per_element),
                f"{line.copy_gb_s:.1f}",
                f"{line.ours_gb_s:.1f}",
                f"{line.share:.0%}",
                f"{line.ns_per_vector:.1f}",
                "" if line.cycles_per_vector is None else f"{line.cycles_per_vector:.0f}",
            )
            for line in rooflines
        ),
    )


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Extra maps by peer and number of candidates."""
    counts = next(iter(memory.values()))
    yield from table(
        ("peer", *counts),
        ([peer, *(f"{value:.2f}" for value in found.values())] for peer, found in memory.items()),
    )


def network_table(network: Mapping[str, Times]) -> Iterator[str]:
    """The training step of each network, and over that without candidates."""
    base = network[NO_CANDIDATES].median
    yield from table(
        ("network", "step, ms", "over skip_connect alone"),
        (
            (name, milliseconds(times), f"{times.median / base:.2f}")
            for name, times in network.items()
        ),
    )
