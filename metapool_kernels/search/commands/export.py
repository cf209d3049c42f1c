"""The trained network as files that run without this package, and on the runtimes of devices."""

import copy
import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from metapool_kernels.devices.registry import load_target
from metapool_kernels.devices.run import (
    Answer,
    TargetError,
    check_installed,
    program_bytes,
    run_target,
)
from metapool_kernels.devices.target import PROGRAM, Int8Target, trace
from metapool_kernels.plain import FORM, Form
from metapool_kernels.search.data.inspection import load_inspected
from metapool_kernels.search.data.splits import evaluation_batches, image_settings, training_batches
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.console import format_table
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.controls import build_network, load_network
from metapool_kernels.search.run.run_folder import SEARCHED, RunFolder
from metapool_kernels.search.settings.config import Config

TARGETS = "targets.json"

TOLERANCE = 1e-4
"""Largest difference that is let through, as a share of the largest output (at least 1)."""

ROUNDING = 10
"""As many times as float32 itself is off in a network may a file be, beside that."""

SAMPLES = 30
"""How often each network is timed."""

CALIBRATION = 128
"""Training images that the ranges of integers are read off."""

EVALUATION = 1000
"""Images that a file of integers is judged by, at most."""

_BATCH = 64
"""Of these, how many torch takes at a time."""


class Images(NamedTuple):
    """Real images, which files of integers are made with and judged by.

    Attributes:
        calibration: (N, C, H, W), of those that the network was trained on.
        evaluation: (M, C, H, W), of others.
        targets: (M,), their class numbers.
    """

    calibration: Tensor
    evaluation: Tensor
    targets: Tensor

    def accuracy(self, outputs: Tensor) -> float:
        """Of outputs (M, classes) for the evaluation, in percent."""
        correct = (outputs.argmax(1) == self.targets).sum().item()
        return 100 * correct / len(self.targets)


class Cases(NamedTuple):
    """Batches of images by name, and what should become of each."""

    images: dict[str, Tensor]
    expected: dict[str, Tensor]  # in float64
    allowed: dict[str, float]

    def difference(self, case: str, got: Tensor) -> float:
        """Largest difference of one output; infinite where NaN or another shape came."""
        expected = self.expected[case]
        if got.shape != expected.shape:
            return float("inf")
        return (got.double() - expected).abs().max().nan_to_num(float("inf")).item()


def run_export(config: Config, targets: Sequence[str] = ("onnx",)) -> None:
    """``metapool export``: write the adapted network of the run's seed into ``export/``.

    Raises:
        UserError: it has not been trained, the images for targets of integers are not there any
            more, or as for :func:`export_network`.
    """
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    seed = architecture.seed
    trained = RunFolder(searched / run_folder.ADAPT / SEARCHED / str(seed))
    network = load_network(SEARCHED, architecture, seed, trained)
    folder = RunFolder(searched / run_folder.EXPORT)
    beside = {name: build_network(name, architecture, seed) for name in ("none", "skip")}
    found = export_network(
        network,
        architecture.backbone.image_shape,
        folder,
        targets=targets,
        beside=beside,
        images=cache(partial(_images, config, searched)),
    )
    print(_table(found))
    if _reasons(found):
        raise UserError(f"no file for {_reasons(found)}")


def _is_int8(target: str) -> bool:
    return isinstance(load_target(target), Int8Target)


def _images(config: Config, searched: RunFolder) -> Images:
    """Some of those that the networks were trained on, and of those for evaluation."""
    searched.check_settings(config, image_settings(config))
    data = load_inspected(config, make_accelerator(config))
    split = searched.load_split()
    split.check(data)
    trained_on = [*split.weight, *split.alpha]
    taken = replace(config.data, batch_size=min(CALIBRATION, len(trained_on)))
    # In an order and with variations that do not change from one export to the next.
    calibration, _ = next(
        training_batches(data.train_set, trained_on, taken, seed=0, start_step=0, epoch_seed=0)
    )
    step = ceil(len(data.evaluation) / EVALUATION)
    batches = evaluation_batches(data.evaluation_set, data.evaluation[::step], config.data)
    evaluation, targets = map(torch.cat, zip(*batches, strict=True))
    return Images(calibration, evaluation, targets)


def export_network(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    run: RunFolder,
    *,
    targets: Sequence[str] = ("onnx",),
    beside: Mapping[str, nn.Module] | None = None,
    images: Callable[[], Images] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write ``network.pt2``, the files of each target, and ``targets.json`` about them.

    The files hold plain operations only, the weights of mixtures fixed, and nothing about the
    machine that they were made on. ``torch.export.load`` reads the first, without this package;
    it takes a batch of any size, and so does ``network.onnx``. All are loaded again, each in its
    runtime, and compared with ``model`` in eval mode and float64, on random and on odd images.

    Args:
        model: a trained network, such as a derived one; stays as it is.
        image_shape: of one input, (C, H, W).
        run: where the files go.
        targets: names in :data:`metapool_kernels.devices.registry.NAMES`.
        beside: other networks, whose time on each target is told beside that of ``model``.
        images: loads what targets of integers need, called when it is their turn. They are not
            compared but judged by accuracy.

    Returns:
        By target, ``torch`` the first: either ``files`` (bytes by name), ``difference`` (the
        largest), ``outside``, ``versions`` and ``seconds`` (median and quartiles by network), for
        integers ``accuracy`` (of the file, of the network in float32, of how many images), or the
        ``reason`` why there is none.

    Raises:
        UserError: the network cannot be exported, ``network.pt2`` computes something else, no
            target has given a file, or the folder cannot be written.
    """
    found: dict[str, dict[str, Any]] = {"torch": {}}
    found |= {name: _not_installed(name) for name in targets}
    if targets and all(found[name] for name in targets):
        raise UserError(_reasons(found))
    cases = make_cases(model, image_shape)
    networks = {SEARCHED: model, **(beside or {})}
    trace_once = cache(lambda key, form: _trace(networks[key], image_shape, form))
    contents = {PROGRAM: program_bytes(trace_once(SEARCHED, FORM))}
    outputs = _run_program(contents[PROGRAM], cases.images)
    found["torch"] = {"files": _sizes(contents), "difference": _check(PROGRAM, outputs, cases)}
    for name in (name for name in targets if not found[name]):
        form = load_target(name).form
        try:
            programs = {key: trace_once(key, form) for key in networks}
            if _is_int8(name):
                answer, judged = _in_integers(name, programs, model, images)
            else:
                answer = run_target(name, programs, cases=_arrays(cases), samples=SAMPLES)
                judged = _compared(answer, cases)
            found[name] = _entry(answer, judged)
            contents |= answer.files
        except (TargetError, UserError) as error:
            found[name] = _failed(error)
    if targets and all("reason" in found[name] for name in targets):
        raise UserError(_reasons(found))
    for file, content in contents.items():
        run.write(file, content)
    run.write(TARGETS, json.dumps(found, indent=2) + "\n")
    return found


def _not_installed(name: str) -> dict[str, Any]:
    try:
        check_installed(name)
    except TargetError as error:
        return _failed(error)
    return {}


def _failed(error: Exception) -> dict[str, Any]:
    return {"reason": " ".join(str(error).split())}


def _reasons(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Why there are no files, of each target without any."""
    reasons = {name: entry["reason"] for name, entry in found.items() if "reason" in entry}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def make_cases(model: nn.Module, image_shape: Sequence[int]) -> Cases:
    """Images that a file has to take: one and several, random, all zero, large, with ties.

    What is allowed grows with what float32 itself loses in the network. Odd images of which the
    network makes no numbers, such as zeros that it divides by, are left out.

    Raises:
        UserError: of random images the network makes no numbers.
    """
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    images = {
        "batch of 1": noise(1, *image_shape),
        "batch of 4": noise(4, *image_shape),
        "zeros": torch.zeros(1, *image_shape),
        "large": 100 * noise(1, *image_shape),
        "ties": noise(1, *image_shape).round().clamp(0, 2),
    }
    single = copy.deepcopy(model).cpu().eval()
    double = copy.deepcopy(single).double()
    expected, allowed = {}, {}
    with torch.no_grad():
        for case, batch in images.items():
            truth = double(batch.double())
            if not truth.isfinite().all():
                if case.startswith("batch"):
                    raise UserError("the network gives NaN or Inf for random images")
                continue
            expected[case] = truth
            rounding = (single(batch) - expected[case]).abs().max().item()
            largest = max(1.0, expected[case].abs().max().item())
            allowed[case] = TOLERANCE * largest + ROUNDING * rounding
    return Cases({case: images[case] for case in expected}, expected, allowed)


def _trace(model: nn.Module, image_shape: Sequence[int], form: Form) -> ExportedProgram:
    try:
        program = trace(model, image_shape, form)
    # Whatever a network does that cannot be traced: torch has no common base for these errors.
    except Exception as error:
        raise UserError(f"torch.export cannot take this network: {error}") from error
    ours = [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("metapool_kernels")
    ]
    if ours:
        raise UserError(
            f"the network calls {ours[0]!r} outside of its enhancers; use MetaPool2d or "
            "MultiPool2d, and give a subclass with a forward of its own a to_torch"
        )
    return program


def _run_program(content: bytes, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # torch 2.10 means the bytes in memory that it has just read itself.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        module = torch.export.load(io.BytesIO(content)).module()
    with torch.inference_mode():
        return {case: module(batch) for case, batch in images.items()}


def _check(name: str, outputs: Mapping[str, Tensor], cases: Cases) -> float:
    """The largest difference.

    Raises:
        UserError: it is larger than what is allowed.
    """
    differences = {case: cases.difference(case, got) for case, got in outputs.items()}
    for case, difference in differences.items():
        if not difference <= cases.allowed[case]:
            raise UserError(
                f"{name} computes something else than the network: outputs differ by "
                f"{difference:.2g} ({case}), allowed are {cases.allowed[case]:.2g}"
            )
    return max(differences.values())


def _compared(answer: Answer, cases: Cases) -> dict[str, Any]:
    outputs = {case: torch.from_numpy(output) for case, output in answer.outputs.items()}
    return {"difference": _check(next(iter(answer.files)), outputs, cases)}


def _in_integers(
    name: str,
    programs: Mapping[str, ExportedProgram],
    model: nn.Module,
    load_images: Callable[[], Images] | None,
) -> tuple[Answer, dict[str, Any]]:
    """Made with real images and judged by them."""
    if load_images is None:
        raise TargetError("it reads ranges off images, and none are given")
    images = load_images()
    answer = run_target(
        name,
        programs,
        singles={"evaluation": images.evaluation.numpy()},
        calibration=images.calibration.numpy(),
        samples=SAMPLES,
    )
    single = copy.deepcopy(model).cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([single(batch) for batch in images.evaluation.split(_BATCH)])
    got = torch.from_numpy(answer.outputs["evaluation"])
    if got.shape != expected.shape or not got.isfinite().all():
        raise TargetError("its outputs are of another shape, or not finite")
    accuracy = {
        "file": images.accuracy(got),
        "float32": images.accuracy(expected),
        "images": len(got),
    }
    return answer, {"difference": (got - expected).abs().max().item(), "accuracy": accuracy}


def _entry(answer: Answer, judged: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "files": _sizes(answer.files),
        **judged,
        "outside": answer.outside,
        "versions": answer.versions,
        "seconds": {name: latency._asdict() for name, latency in answer.latencies.items()},
    }


def _sizes(contents: Mapping[str, bytes]) -> dict[str, int]:
    return {name: len(content) for name, content in contents.items()}


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What came of each target; times as multiples of those without enhancers too."""
    rows = []
    for name, entry in found.items():
        if "reason" in entry:
            continue
        sizes = ", ".join(f"{file} ({size:,})" for file, size in entry["files"].items())
        notes = []
        if entry.get("outside"):
            times = Counter(entry["outside"])
            notes.append(f"outside: {', '.join(f'{n} {name}' for name, n in times.items())}")
        if "accuracy" in entry:
            notes.append(_accuracy(entry["accuracy"]))
        latencies = _times(entry.get("seconds", {}))
        rows.append((name, sizes, f"{entry['difference']:.1e}", *latencies, "; ".join(notes)))
    head = (
        "target",
        "files (bytes)",
        "difference",
        "ms, one thread",
        "quartiles",
        "beside",
        "notes",
    )
    return format_table(head, rows)


def _accuracy(accuracy: Mapping[str, float]) -> str:
    """Before and after."""
    images = accuracy["images"]
    return (
        f"accuracy {accuracy['file']:.2f}%, in float32 {accuracy['float32']:.2f}% "
        f"({images:,} images)"
    )


def _times(seconds: Mapping[str, Mapping[str, float]]) -> tuple[str, str, str]:
    if SEARCHED not in seconds:
        return "", "", ""
    own = seconds[SEARCHED]
    beside = ", ".join(
        f"{own['median'] / other['median']:.2f} times {name}"
        for name, other in seconds.items()
        if name != SEARCHED
    )
    quartiles = f"{1e3 * own['lower']:.3g} to {1e3 * own['upper']:.3g}"
    return f"{1e3 * own['median']:.3g}", quartiles, beside


def _arrays(cases: Cases) -> dict[str, NDArray[np.float32]]:
    return {case: images.numpy() for case, images in cases.images.items()}
