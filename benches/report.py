"""``python -m benches.report``: everything measured, as JSON, Markdown and a picture.

Under 12 minutes on two cores, with ``--quick`` under one and a half.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benches import plots, tables
from benches.aims import Aim, aims
from benches.cases import report_cases
from benches.conditions import conditions, slug
from benches.figures import Roofline, Row, rooflines, rows
from benches.measure import Result, measure, measure_apart
from benches.memory import measure_memory
from benches.network import measure_network
from benches.peers import OURS
from benches.timing import QUICK, Effort, Times, keep_memory

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs", "bench-quick")  # not kept: small batches say little


def results_folder(quick: bool) -> Path:
    """Where figures of this machine go; made if it is not there."""
    folder = QUICK_RESULTS if quick else RESULTS / slug()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


NOTES = """\
Peers are called in turn, round by round; a figure is the median [lower, upper quartile] of all
calls. A peer whose result differs from the definition has no figures. A "copy" is `out.copy_(x)`
into memory that is there, in the layout NCHW. "x eager NCHW" says how many times faster ours is.
Maps that fit the caches flatter the copy most. Data are as after ReLU6 where no other are named.
In torch.compile, windows of over 25 elements fall back to eager kernels. Nested maxima route the
gradient of ties otherwise, and are checked on data without ties. The merged convolution has
averages alone. OpenCV runs the images of a batch in as many threads as torch has.
"""


@dataclass(frozen=True)
class Report:
    """All that was measured and read out of it."""

    conditions: dict[str, str]
    results: list[Result]
    rows: list[Row]
    aims: list[Aim]
    rooflines: list[Roofline]
    memory: dict[str, dict[str, float]]
    network: dict[str, Times]


def collect(quick: bool, system_malloc: bool) -> Report:
    """Measure everything. Says on the way what it is at: this takes minutes."""
    allocator = "as it is" if system_malloc else keep_memory()
    about = conditions(allocator)
    print("\n".join(f"{name}: {text}" for name, text in about.items()), flush=True)
    effort = QUICK if quick else Effort()
    results = []
    for position, case in enumerate(report_cases(quick)):
        began = time.perf_counter()
        if case.isa is None:
            results.append(measure(case, effort))
        else:
            results.append(measure_apart(position, case, quick, system_malloc))
        _tell(results[-1], time.perf_counter() - began)
    network = measure_network(quick)
    memory = measure_memory(quick)
    found = aims(results, network, memory)
    table = list(rows(results))
    return Report(about, results, table, found, list(rooflines(results)), memory, network)


def _tell(result: Result, seconds: float) -> None:
    ours = [tables.milliseconds(result.times[name]) for name in OURS if name in result.times]
    print(f"{seconds:5.1f} s  {result.case}: {', '.join(ours)} ms", flush=True)
    for name, reason in result.withheld.items():
        print(f"         withheld: {name}: {reason}", flush=True)


def markdown(report: Report) -> Iterator[str]:
    """The report's lines."""
    yield "# Speed and memory of the op and its peers\n"
    yield from (f"- {name}: {text}" for name, text in report.conditions.items())
    yield f"\n{NOTES}"
    sections = {
        "Aims": tables.aims_table(report.aims),
        "Ours": tables.ours_table(report.rows),
        "Every peer, ms": tables.peers_table(report.results),
        "Roofline: bytes with perfect reuse, time per float32 vector and thread": (
            tables.roofline_table(report.rooflines)
        ),
        "Peak memory of forward + backward beyond x, out and their gradients, in maps": (
            tables.memory_table(report.memory)
        ),
        "Training step of MobileNetV2 with 16 enhancers": tables.network_table(report.network),
    }
    for title, lines in sections.items():
        yield f"\n## {title}\n"
        yield from lines
    yield "\n![Times of the peers, and speed-up over map sizes](report.png)"


def write(report: Report, folder: Path) -> None:
    """``report.json``, ``report.md`` and ``report.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = asdict(report)
    text = json.dumps(facts, indent=1, default=lambda value: getattr(value, "value", str(value)))
    (folder / "report.json").write_text(text + "\n")
    (folder / "report.md").write_text("\n".join(markdown(report)) + "\n")
    plots.draw(report.results, folder / "report.png")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small batches, the main cases")
    parser.add_argument(
        "--out", type=Path, help="folder; default: benches/results/<cpu>, or runs/bench-quick"
    )
    parser.add_argument(
        "--system-malloc", action="store_true", help="leave the memory allocator as it is"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    folder = arguments.out or results_folder(arguments.quick)
    write(collect(arguments.quick, arguments.system_malloc), folder)
    print(f"{time.perf_counter() - began:.0f} s in all; see {folder / 'report.md'}")


if __name__ == "__main__":
    main()
