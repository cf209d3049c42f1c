"""``python -m metapool_kernels.devices.worker TARGET FOLDER``: one target, in a process of its own.

Native runtimes clash with each other, print what they like and crash; here they can. The folder
holds ``job.json`` and what it names; what is found is written there.
"""

import json
import sys
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
from metapool_kernels.devices.target import PROGRAM, Converted, Int8Target, Target, image_shape

JOB = "job.json"
ANSWER = "answer.json"
CASES = "cases.safetensors"
SINGLES = "singles.safetensors"
CALIBRATION = "calibration.safetensors"
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
    calibration = load_file(folder / CALIBRATION).get(CALIBRATION)
    places = {network: folder / network for network in job["networks"]}
    programs = {network: torch.export.load(places[network] / PROGRAM) for network in places}
    converted = {
        network: _convert(target, program, places[network], 1, calibration)
        for network, program in programs.items()
    }
    first = job["networks"][0]
    answer: dict[str, Any] = {
        **converted[first]._asdict(),
        "versions": package_versions(target),
    }
    cases, singles = load_file(folder / CASES), load_file(folder / SINGLES)
    single = {network: target.load(place, 1) for network, place in places.items()}
    runners = {1: single[first]}
    for batch in {len(images) for images in cases.values()} - {1}:
        place = places[first]
        if not target.any_batch:
            place = place / f"batch_{batch}"
            place.mkdir()
            _convert(target, programs[first], place, batch, calibration)
        runners[batch] = target.load(place, batch)
    outputs = {case: runners[len(images)](images) for case, images in cases.items()}
    for case, images in singles.items():
        outputs[case] = np.concatenate([runners[1](image[None]) for image in images])
    save_file({case: np.ascontiguousarray(out) for case, out in outputs.items()}, folder / OUTPUTS)
    if job["samples"]:
        runs = {
            network: partial(single[network], _noise(program))
            for network, program in programs.items()
        }
        answer["latencies"] = interleaved(runs, job["samples"])
    return answer


def _convert(
    target: Target, program: ExportedProgram, place: Path, batch: int, calibration: Images | None
) -> Converted:
    """Ranges of integers are read off noise if there is nothing else: enough for taking times."""
    if isinstance(target, Int8Target):
        target.calibrate(_noise(program, 8) if calibration is None else calibration)
    return target.convert(program, place, batch)


def _noise(program: ExportedProgram, batch: int = 1) -> Images:
    shape = (batch, *image_shape(program))
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
