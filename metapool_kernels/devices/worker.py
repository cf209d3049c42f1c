"""``python -m metapool_kernels.devices.worker TARGET FOLDER``: one target, in a process of its own.

Native runtimes clash with each other, print what they like and crash; here they can. The folder
holds ``job.json`` and what it names; what is found is written there.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch.export import ExportedProgram

from metapool_kernels.devices.latency import interleaved
from metapool_kernels.devices.registry import load_target, package_versions
from metapool_kernels.devices.target import PROGRAM, Target, image_shape

JOB = "job.json"
ANSWER = "answer.json"
IMAGES = "images.safetensors"
OUTPUTS = "outputs.safetensors"

Images = NDArray[np.float32]


def main(name: str, folder: Path) -> None:
    """Write what came of the job, or why nothing did."""
    torch.set_num_threads(1)
    try:
        answer = _answer(name, folder)
    except Exception as error:
        answer = {"reason": _in_one_line(error)}
    (folder / ANSWER).write_text(json.dumps(answer))


def _in_one_line(error: BaseException) -> str:
    """The first line of what is wrong, and that of what it goes back to."""
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    lines = []
    for each in (error, root):
        text = next(filter(None, map(str.strip, str(each).splitlines())), "")
        lines.append(f"{type(each).__name__}: {text}" if text else type(each).__name__)
    return " <- ".join(dict.fromkeys(lines))


def _answer(name: str, folder: Path) -> dict[str, Any]:
    """Convert every network, run the images through the first, time all of them."""
    job = json.loads((folder / JOB).read_text())
    target = load_target(name)
    places = {network: folder / network for network in job["networks"]}
    programs = {network: torch.export.load(places[network] / PROGRAM) for network in places}
    converted = {
        network: target.convert(program, places[network], 1)
        for network, program in programs.items()
    }
    first = job["networks"][0]
    answer: dict[str, Any] = {
        **converted[first]._asdict(),
        "versions": package_versions(target),
    }
    if (folder / IMAGES).exists():
        outputs = _outputs(target, programs[first], places[first], load_file(folder / IMAGES))
        save_file(outputs, folder / OUTPUTS)
    if job["samples"]:
        runs = {
            network: partial(target.load(places[network], 1), _noise(program))
            for network, program in programs.items()
        }
        answer["latencies"] = interleaved(runs, job["samples"])
    return answer


def _outputs(
    target: Target, program: ExportedProgram, place: Path, cases: Mapping[str, Images]
) -> dict[str, Images]:
    """What the files make of the images, by case; those of another batch are made for it."""
    runners = {1: target.load(place, 1)}
    found = {}
    for name, images in cases.items():
        batch = len(images)
        if batch not in runners:
            folder = place
            if not target.any_batch:
                folder = place / f"batch_{batch}"
                folder.mkdir()
                target.convert(program, folder, batch)
            runners[batch] = target.load(folder, batch)
        found[name] = np.ascontiguousarray(runners[batch](images))
    return found


def _noise(program: ExportedProgram) -> Images:
    shape = (1, *image_shape(program))
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
