"""``python -m benches.device_forms onnx``: what the form of an exported pooling costs on a runtime.

MobileNetV2-0.35 with one kind of pooling in 16 layers, in whole windows and in the form that
exports have (:class:`metapool_kernels.plain.Form`; that leaves 3x3 whole), timed beside each other
in the real runtime: one image, one thread. Needs the packages of the target. Adds to
``devices.json`` and ``.md`` under ``benches/results/``; a minute or two for each target, ten and
more for ExecuTorch, whose converter is slow.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn

from benches.conditions import conditions
from benches.report import results_folder
from benches.tables import table
from metapool_kernels.devices.run import TargetError, run_target
from metapool_kernels.devices.target import trace
from metapool_kernels.plain import Form
from metapool_kernels.search.networks.surgery import add_enhancers

WHOLE = Form(split_max=None, split_avg=None, pad_outside=False)
STRIPS = Form(split_max=1, split_avg=1, pad_outside=True)
PADDED = Form(split_max=None, split_avg=None, pad_outside=True)
FORMS = {"whole": WHOLE, "padded outside": PADDED, "strips": STRIPS}

POOLINGS = [f"{kind} {side}x{side}" for kind in ("max", "avg") for side in (3, 5, 7, 15)]
NETWORKS = {
    "skip": ("skip_connect",),
    **{name: (name.replace(" ", "_pool_"),) for name in POOLINGS},
    "max 7x7 + avg 7x7": ("max_pool_7x7", "avg_pool_7x7"),
}


def network(candidates: tuple[str, ...], side: int) -> nn.Module:
    """MobileNetV2-0.35 with enhancers of these candidates."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=10)
    add_enhancers(
        model, torch.zeros(1, 3, side, side), r"blocks\.[1-6]\.\d+\.bn2", candidates=candidates
    )
    return model.eval()


def measure(
    target: str, only: str, side: int, samples: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Medians in ms by network and form, or the reason why there is none; packages' versions."""
    found: dict[str, Any] = {}
    versions: dict[str, str] = {}
    skip = trace(network(("skip_connect",), side), (3, side, side), WHOLE)
    for name, candidates in NETWORKS.items():
        if not re.search(only, name):
            continue
        model = network(candidates, side)
        programs = {form: trace(model, (3, side, side), FORMS[form]) for form in _forms(name)}
        try:
            answer = run_target(target, {"skip": skip, **programs}, samples=samples)
            found[name] = {key: 1e3 * each.median for key, each in answer.latencies.items()}
            versions = answer.versions
        except TargetError as error:
            found[name] = {"reason": str(error)}
        print(target, name, json.dumps(found[name]), flush=True)
    return found, versions


def _forms(name: str) -> list[str]:
    """Those in which a network differs."""
    if name == "skip":
        return []
    return [form for form in FORMS if form != "padded outside" or "avg" in name]


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """The report."""
    yield "# Poolings on the runtimes of devices\n"
    yield "Made by `python -m benches.device_forms TARGET`. MobileNetV2-0.35 with the same pooling"
    yield "in 16 layers, one image, one thread: times the same network with skip_connect, measured"
    yield "in the same run; `whole` with windows as they are, `strips` as (1, k) and (k, 1).\n"
    for target, entry in found.items():
        yield f"\n## {target}\n"
        for name, text in entry["conditions"].items():
            yield f"- {name}: {text}"
        yield ""
        yield from table(("pooling", "skip, ms", *FORMS, "whole / strips"), _rows(entry["times"]))


def _rows(times: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, row in times.items():
        if "reason" in row:
            yield (name, row["reason"], *[""] * (len(FORMS) + 1))
            continue
        each = [f"{row[form] / row['skip']:.2f}" if form in row else "" for form in FORMS]
        gain = f"{row['whole'] / row['strips']:.2f}" if "strips" in row else ""
        yield (name, f"{row['skip']:.2f}", *each, gain)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--only", default="", metavar="REGEX", help="poolings, such as 'avg 7x7'")
    parser.add_argument("--side", type=int, default=224, help="of the images")
    parser.add_argument("--samples", type=int, default=30)
    arguments = parser.parse_args()
    folder = results_folder(quick=False)
    file = folder / "devices.json"
    for target in arguments.targets:
        times, packages = measure(target, arguments.only, arguments.side, arguments.samples)
        # Read again: another target may have been measured meanwhile, in its own environment.
        found = json.loads(file.read_text()) if file.exists() else {}
        packages = {"torch": torch.__version__, **packages}
        about = {
            "CPU": conditions("")["CPU"],
            "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
            "images": f"{arguments.side} x {arguments.side}",
        }
        kept = found.get(target, {})
        if kept.get("conditions") == about:
            times = kept["times"] | times
        found[target] = {"conditions": about, "times": times}
        file.write_text(json.dumps(found, indent=1) + "\n")
        (folder / "devices.md").write_text("\n".join(markdown(found)) + "\n")


if __name__ == "__main__":
    main()
