"""Networks carried to a runtime, each in a process of its own."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.export import ExportedProgram

import metapool_kernels
from metapool_kernels.devices import worker
from metapool_kernels.devices.latency import Latency
from metapool_kernels.devices.registry import extra, load_target, missing_packages
from metapool_kernels.devices.target import PROGRAM, trace


class TargetError(RuntimeError):
    """What a converter or runtime does not do, in one line."""


class Answer(NamedTuple):
    """What a target has made of networks.

    Attributes:
        files: of the first network, by name.
        outside: operators that the runtime's fast part leaves to another; None without such a part.
        versions: of the packages.
        outputs: of the first network, by the names of cases and singles.
        latencies: of each network.
    """

    files: dict[str, bytes]
    outside: list[str] | None
    versions: dict[str, str]
    outputs: dict[str, NDArray[np.float32]]
    latencies: dict[str, Latency]


def check_installed(name: str) -> None:
    """Whether everything that a target needs is there.

    Raises:
        TargetError: it is not.
    """
    missing = missing_packages(load_target(name))
    if missing:
        raise TargetError(
            f'it needs {" and ".join(missing)}: pip install "metapool_kernels[{extra(name)}]"'
        )


def run_target(
    name: str,
    programs: Mapping[str, ExportedProgram],
    *,
    cases: Mapping[str, NDArray[np.float32]] | None = None,
    singles: Mapping[str, NDArray[np.float32]] | None = None,
    calibration: NDArray[np.float32] | None = None,
    samples: int = 0,
) -> Answer:
    """Convert networks, load what came in the real runtime, on one thread, and try it there.

    Args:
        name: of the target, one of :data:`metapool_kernels.devices.registry.NAMES`.
        programs: by :func:`metapool_kernels.devices.target.trace`, in the target's form.
        cases: batches of images for the first of them, of any sizes.
        singles: the same, but run one image at a time.
        calibration: images that a target of integers reads its ranges off; None: noise.
        samples: how often each network is timed, with one image; 0: not at all.

    Raises:
        TargetError: a package is missing, or the converter or the runtime cannot take the network.
    """
    check_installed(name)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for network, program in programs.items():
            (folder / network).mkdir()
            (folder / network / PROGRAM).write_bytes(program_bytes(program))
        save_file(dict(cases or {}), folder / worker.CASES)
        save_file(dict(singles or {}), folder / worker.SINGLES)
        ranges = {} if calibration is None else {worker.CALIBRATION: calibration}
        save_file(ranges, folder / worker.CALIBRATION)
        job = {"networks": list(programs), "samples": samples}
        (folder / worker.JOB).write_text(json.dumps(job))
        _run_worker(name, folder)
        return _read_answer(folder, next(iter(programs)))


def measure_networks(
    target: str,
    networks: Mapping[str, nn.Module],
    image_shapes: Mapping[str, Sequence[int]],
    *,
    samples: int = 30,
) -> dict[str, Latency]:
    """How long networks take beside each other, for one image, on one thread.

    Args:
        target: one of :data:`metapool_kernels.devices.registry.NAMES`.
        networks: as for :func:`metapool_kernels.devices.target.trace`, by any names.
        image_shapes: of one image for each of them, (C, H, W).
        samples: how often each is timed.

    Raises:
        TargetError: as for :func:`run_target`.
    """
    check_installed(target)
    form = load_target(target).form
    programs = {
        str(k): trace(network, image_shapes[name], form)
        for k, (name, network) in enumerate(networks.items())
    }
    latencies = run_target(target, programs, samples=samples).latencies
    return dict(zip(networks, latencies.values(), strict=True))


def program_bytes(program: ExportedProgram) -> bytes:
    """What ``torch.export.load`` takes."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _run_worker(name: str, folder: Path) -> None:
    package = str(Path(metapool_kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    call = [sys.executable, "-m", "metapool_kernels.devices.worker", name, str(folder)]
    log = folder / "log"
    with log.open("wb") as output:
        # Threads that OpenMP or a converter would start beside the one that is timed.
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            call, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode or not (folder / worker.ANSWER).exists():
        raise TargetError(_last_words(done.returncode, log.read_text(errors="replace")))


def _last_words(code: int, output: str) -> str:
    """Of a process that has ended without an answer."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    return f"its process ended {how}; its last words: {lines[-1] if lines else '(none)'}"


def _read_answer(folder: Path, first: str) -> Answer:
    answer = json.loads((folder / worker.ANSWER).read_text())
    if "reason" in answer:
        raise TargetError(answer["reason"])
    return Answer(
        files={name: (folder / first / name).read_bytes() for name in answer["files"]},
        outside=answer["outside"],
        versions=answer["versions"],
        outputs=load_file(folder / worker.OUTPUTS),
        latencies={name: Latency(*numbers) for name, numbers in answer["latencies"].items()}
        if "latencies" in answer
        else {},
    )
