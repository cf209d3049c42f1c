"""``python -m benches.gpu_check``: run the steps and write the report after each."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

from benches.gpu_check import pack, page
from benches.gpu_check.journal import DONE, FAILED, Journal, read
from benches.gpu_check.runner import Step, kill_all, run_step
from benches.gpu_check.steps import steps

RESULTS = Path(__file__).parents[1] / "results"


def facts() -> dict[str, str]:
    """What stands above the figures."""
    found = {
        "device": "CPU, a rehearsal",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": pack.commit(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "python": sys.version.split()[0],
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = "unknown"
        with suppress(OSError):
            done = subprocess.run(question, capture_output=True, text=True, check=False)
            found["driver"] = done.stdout.strip() or "unknown"
    return found


def resume(source: Path, target: Path, planned: list[Step]) -> None:
    """Begin the journal with what an earlier run has measured: that stays valid."""
    measured = {
        (step.name, program.name)
        for step in planned
        for program in step.programs
        if program.measures
    }
    commit = page.read_facts(source.parent).get("commit", "unknown")
    kept = [
        {"commit": commit} | event
        for event in read(source)
        if (event["step"], event["program"]) in measured and event["state"] == DONE
    ]
    target.write_text("".join(json.dumps(event) + "\n" for event in kept))


def keep_others(journal: Path, steps_now: Sequence[Step]) -> None:
    """Take out of the journal what is run anew; the other steps stay in the report."""
    again = {step.name for step in steps_now}
    kept = [event for event in read(journal) if event["step"] not in again]
    journal.write_text("".join(json.dumps(event) + "\n" for event in kept))


def failed_before(source: Path) -> Mapping[str, list[str]]:
    """The rows that failed in an earlier run, by their step."""
    found: dict[str, list[str]] = {}
    for event in read(source):
        if event["state"] == FAILED:
            found.setdefault(event["step"], []).append(event["row"])
    return found


def main() -> int:
    """Run the steps; the exit code says whether nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names begin so")
    parser.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FOLDER",
        help="keep what was measured there, and run first what failed; default: as committed",
    )
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here; rehearse with --dry-run", file=sys.stderr)
        return 2
    now = facts()
    own = RESULTS / re.sub(r"[^a-z0-9]+", "-", now["device"].lower()).strip("-")
    folder = arguments.out or own
    folder.mkdir(parents=True, exist_ok=True)
    journal, earlier = folder / f"{page.NAME}.jsonl", None
    if arguments.resume is not None:
        earlier = (own if arguments.resume == Path() else arguments.resume) / journal.name
        if not earlier.exists():
            print(f"there is nothing to resume in {earlier.parent}", file=sys.stderr)
            return 2
    capability = None
    if not arguments.dry_run:
        capability = "".join(map(str, torch.cuda.get_device_capability()))
    planned = steps(capability, failed_before(earlier) if earlier else {})
    if arguments.only:
        planned = [step for step in planned if step.name.startswith(tuple(arguments.only))]
    if earlier:
        resume(earlier, journal, planned)
    elif arguments.only:
        keep_others(journal, planned)
    else:
        journal.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, _leave)
    for step in planned:
        print(f"== {step.name}: at most {step.seconds:.0f} s", flush=True)
        seconds = run_step(step, journal)
        Journal(journal, step.name, "").write("", "step", seconds=seconds, limit=step.seconds)
        try:
            page.write(folder, now)
        except Exception as error:  # what comes after is worth more than its report
            print(f"the report cannot be written: {error!r}", file=sys.stderr)
    report = page.write(folder, now)
    print((folder / f"{page.NAME}.md").read_text())
    failed = list(dict.fromkeys(event["step"] for event in report.failures))
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


def _leave(number: int, frame: object) -> None:
    """When the time on a machine is over, nothing of ours goes on there."""
    kill_all()
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
