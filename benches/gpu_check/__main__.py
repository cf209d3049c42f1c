"""``python -m benches.gpu_check``: run the steps and write the report after each."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

from benches.gpu_check import pack, page
from benches.gpu_check.journal import DONE, FAILED, read
from benches.gpu_check.runner import Step, run_step
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
        done = subprocess.run(question, capture_output=True, text=True, check=False)
        found["driver"] = done.stdout.strip() or "unknown"
    return found


def resume(source: Path, target: Path, planned: list[Step]) -> None:
    """Begin the journal with what an earlier run has measured: that stays valid."""
    measured = {step.name for step in planned if step.measures}
    kept = [e for e in read(source) if e["step"] in measured and e["state"] == DONE]
    target.write_text("".join(json.dumps(event) + "\n" for event in kept))


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
        earlier = shutil.copy(earlier, folder / f"{page.NAME}-before.jsonl")
    capability = None
    if not arguments.dry_run:
        capability = "".join(map(str, torch.cuda.get_device_capability()))
    planned = steps(capability, failed_before(earlier) if earlier else {})
    journal.unlink(missing_ok=True)
    if earlier:
        resume(earlier, journal, planned)
    for step in planned:
        if arguments.only and not step.name.startswith(tuple(arguments.only)):
            continue
        print(f"== {step.name}: at most {step.seconds:.0f} s", flush=True)
        seconds = run_step(step, journal)
        event = {"step": step.name, "program": "", "row": "", "state": "step"}
        event |= {"seconds": seconds, "limit": step.seconds, "at": time.time()}
        with open(journal, "a") as file:
            file.write(json.dumps(event) + "\n")
        report = page.write(folder, now)
    print((folder / f"{page.NAME}.md").read_text())
    failed = list(dict.fromkeys(event["step"] for event in report.failures))
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
