"""The report: what failed, each prediction beside its measurement, times beside those of peers.

``python -m benches.gpu_check.page FOLDER`` writes it again from the journal in a folder, with a
plot where matplotlib is installed.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.cases import PLAIN_NETWORK, Mode
from benches.gpu_check.figures import GPU_BACKENDS
from benches.gpu_check.journal import BEGUN, CUT, DONE, FAILED, PLANNED, Event, read
from benches.gpu_model import PREDICTED

NAME = "gpu-check"
Facts = Mapping[str, Any]
_MAPS_MOVED = {"forward": 2, "backward": 3}
"""Maps that are read and written, at the least."""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown, and an empty line; nothing if there are no lines."""
    rows = [list(line) for line in lines]
    if not rows:
        return []
    marked = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [marked[0], "|" + "---|" * len(head), *marked[1:], ""]


class Report:
    """All that the journal knows, by the last word on each row."""

    def __init__(self, facts: Facts, events: Iterable[Event]) -> None:
        self.facts = facts
        self.steps: dict[str, Event] = {}
        self.last: dict[tuple[str, str, str], Event] = {}
        self.planned: dict[tuple[str, str], list[str]] = {}
        for event in events:
            step, program = event["step"], event["program"]
            if event["state"] == "step":
                self.steps[step] = event
            elif event["state"] == PLANNED:
                self.planned.setdefault((step, program), event["rows"])
            else:
                self.last[step, program, event["row"]] = event

    def rows(self, step: str, state: str) -> list[Event]:
        """Those of a step, in the order in which they came to that state."""
        return [e for (s, _, _), e in self.last.items() if s == step and e["state"] == state]

    @property
    def failures(self) -> list[Event]:
        """All rows that failed, and those that nobody ended."""
        return [event for event in self.last.values() if event["state"] in (FAILED, BEGUN)]

    def not_reached(self, step: str) -> int:
        """Rows for which the time of the step did not do."""
        planned = {(p, row) for (s, p), rows in self.planned.items() if s == step for row in rows}
        over = {(p, row) for (s, p, row), e in self.last.items() if s == step and e["state"] != CUT}
        return len(planned - over)

    def markdown(self) -> str:
        """The page."""
        lines = ["# GPU check", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()] + [""]
        lines += self._steps() + self._failures() + self._predicted() + self._times()
        lines += self._network() + self._waiting() + self._compiled()
        return "\n".join(lines).rstrip() + "\n"

    def _steps(self) -> list[str]:
        head = ("step", "seconds", "of", "rows done", "failed", "skipped", "not reached")
        lines = []
        for name, step in self.steps.items():
            done = self.rows(name, DONE)
            skipped = sum("skipped" in event for event in done)
            counts = (len(done) - skipped, len(self.rows(name, FAILED)), skipped)
            seconds = (f"{step['seconds']:.0f}", f"{step['limit']:.0f}")
            lines.append((name, *seconds, *map(str, (*counts, self.not_reached(name)))))
        return table(head, lines)

    def _failures(self) -> list[str]:
        if not self.failures:
            return ["Nothing failed.", ""]
        head = ("step", "program", "what failed", "why")
        lines = [
            (e["step"], e["program"], e["row"], _one_line(e.get("why", "it never ended")))
            for e in self.failures
        ]
        return ["## What failed", "", *table(head, lines)]

    def _predicted(self) -> list[str]:
        """Every line of the static model with its measured twin."""
        found = {_twin(e): e for e in self.rows("figures", DONE) if e["who"] in GPU_BACKENDS}
        predicted = json.loads(PREDICTED.read_text()) if PREDICTED.exists() else []
        gpu = next((name for name in _gpus(predicted) if name in self.facts["device"]), None)
        head = ["map", "dtype", "layout", "candidates", ""]
        for backend in GPU_BACKENDS:
            head += [f"{backend}: predicted", "measured"]
        lines = []
        for line in predicted:
            key = tuple(line[name] for name in ("map", "dtype", "layout", "candidates"))
            cells = [*key, line["what"]]
            for backend in GPU_BACKENDS:
                share = line["shares"].get(backend, {}).get(gpu)
                event = found.get((*key, line["what"], backend))
                cells.append("" if share is None else f"{share:.0%}")
                cells.append("" if event is None else _share(event, line["what"]))
            if any(cells[6::2]):
                lines.append(cells)
        text = "Share of the speed of a copy, by replay of graphs: the bytes that have to be moved"
        text += ", over the time, beside the same of a copy. Backward is the whole less forward."
        return ["## Prediction and measurement", "", text, "", *table(head, lines)] if lines else []

    def _times(self) -> list[str]:
        rows = self.rows("figures", DONE)
        names = list(dict.fromkeys(event["who"] for event in rows))
        head = ["map", "dtype", "layout", "candidates", "", *names, "copy", "peak, in maps"]
        cases: dict[tuple[str, ...], dict[str, Event]] = {}
        for event in rows:
            cases.setdefault(_case(event), {})[event["who"]] = event
        lines = []
        for case, by_name in cases.items():
            cells = [_both(by_name[n], "") if n in by_name else "" for n in names]
            copy = _both(next(iter(by_name.values())), "copy ")
            lines.append([*case, *cells, copy, _peaks(by_name)])
        text = "Milliseconds by call from Python, second-level cache cold / by replay of a graph. "
        text += f"A copy of the largest map moved {_copy_speed(rows) / 1e12:.2f} TB/s."
        notes = [
            f"- no graph of {e['row']}: {_one_line(e['no graph'])}" for e in rows if "no graph" in e
        ]
        older = Counter(event["commit"] for event in rows if "commit" in event)
        notes += [f"- {count} of these rows are of commit {name}" for name, count in older.items()]
        return ["## Times", "", text, "", *table(head, lines), *notes, ""] if lines else []

    def _network(self) -> list[str]:
        rows = {event["row"]: event for event in self.rows("network", DONE)}
        plain = rows.get(PLAIN_NETWORK)
        lines = [
            (
                name,
                f"{event['seconds'] * 1e3:.1f}",
                f"{event['seconds'] / plain['seconds']:.2f}" if plain else "",
                f"{event['peak bytes'] / 2**30:.1f}" if "peak bytes" in event else "",
            )
            for name, event in rows.items()
        ]
        head = ("step of MobileNetV2", "ms", "times that without enhancers", "peak GiB")
        return ["## The whole network", "", *table(head, lines)] if lines else []

    def _waiting(self) -> list[str]:
        lines = []
        for event in self.rows("first step", DONE):
            parts = ", ".join(
                f"{name} {value:.1f}" for name, value in event["parts"].items() if name != "kernels"
            )
            kernels = str(event["parts"]["kernels"])
            lines.append((event["row"], f"{event['seconds']:.1f}", parts, kernels))
        head = ("kernels", "seconds to the first search step", "of them", "compiled ahead")
        return ["## What a user waits for", "", *table(head, lines)] if lines else []

    def _compiled(self) -> list[str]:
        seconds = [event["seconds"] for event in self.rows("kernels", DONE) if "seconds" in event]
        if not seconds:
            return []
        return [
            f"{len(seconds)} Triton kernels were compiled before the figures, {sum(seconds):.0f} s "
            f"of processes in all, the longest {max(seconds):.1f} s.",
            "",
        ]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def _case(event: Event) -> tuple[str, ...]:
    return tuple(event[name] for name in ("map", "dtype", "layout", "candidates", "mode"))


_WHAT = {Mode.FORWARD.value: "forward", Mode.BOTH.value: "backward"}


def _twin(event: Event) -> tuple[str, ...]:
    """As a line of the model names it."""
    *case, mode = _case(event)
    return (*case, _WHAT.get(mode, mode), event["who"])


def _share(event: Event, what: str) -> str:
    """Of the speed of a copy, which reads one map and writes another."""
    if "replayed" not in event:
        return "no graph"
    seconds = event["replayed"] - event.get("forward replayed", 0)
    return f"{event['copy replayed'] * _MAPS_MOVED[what] / 2 / seconds:.0%}"


def _in_copies(event: Event) -> float:
    """The time over that of a copy, as the device takes it if that is known."""
    name = "replayed" if "replayed" in event else "launched"
    return float(event[name] / event[f"copy {name}"])


def _both(event: Event, prefix: str) -> str:
    names = [f"{prefix}launched", f"{prefix}replayed"]
    return " / ".join(f"{event[name] * 1e3:.3f}" for name in names if name in event)


def _copy_speed(rows: Sequence[Event]) -> float:
    """Bytes a second, read and written together."""
    largest = max(rows, key=lambda event: event["map bytes"], default=None)
    return 2 * largest["map bytes"] / largest["copy launched"] if largest else 0.0


def _peaks(by_name: Mapping[str, Event]) -> str:
    found = []
    for name, event in by_name.items():
        if "peak bytes" in event:
            found.append(f"{name} {event['peak bytes'] / event['map bytes']:.1f}")
    return ", ".join(found)


def _gpus(predicted: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(next(iter(predicted[0]["shares"].values()))) if predicted else []


def read_facts(folder: Path) -> dict[str, Any]:
    """What stands above the report in a folder, if there is one."""
    path = folder / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text())["facts"] if path.exists() else {}
    return found


def write(folder: Path, facts: Facts) -> Report:
    """The report in a folder, as Markdown and JSON, from the journal there."""
    report = Report(facts, read(folder / f"{NAME}.jsonl"))
    (folder / f"{NAME}.md").write_text(report.markdown())
    rows = [event for event in report.last.values() if event["state"] != BEGUN]
    whole = {"facts": dict(facts), "steps": list(report.steps.values()), "rows": rows}
    (folder / f"{NAME}.json").write_text(json.dumps(whole, indent=1) + "\n")
    _plot(report, folder / f"{NAME}.png")
    return report


def _plot(report: Report, path: Path) -> None:
    """Times of the main cases over that of a copy, for ours and all peers."""
    rows = [
        event
        for event in report.rows("figures", DONE)
        if event["candidates"] == "default" and event["mode"] in _WHAT
    ]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not rows:
        return
    panels = list(dict.fromkeys((event["mode"], event["dtype"]) for event in rows))
    names = list(dict.fromkeys((event["who"], event["layout"]) for event in rows))
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = [event for event in rows if (event["mode"], event["dtype"]) == panel]
        maps = list(dict.fromkeys(event["map"] for event in of_panel))
        for i, name in enumerate(names):
            mine = [event for event in of_panel if (event["who"], event["layout"]) == name]
            axes.plot(
                [maps.index(event["map"]) for event in mine],
                [_in_copies(event) for event in mine],
                marker="os"[i % 2],
                color=f"C{i}",
                label=", ".join(name),
            )
        axes.set_xticks(range(len(maps)), maps)
        axes.set(yscale="log", title=", ".join(panel), ylabel="time, in copies of the map")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=100)


def main() -> None:
    """Write it again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(write(folder, read_facts(folder)).markdown())


if __name__ == "__main__":
    main()
