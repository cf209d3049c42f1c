"""Every target in its real runtime; METAPOOL_DEVICE says which, as `make test-devices` does."""

import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metapool_kernels.devices.registry import load_target
from metapool_kernels.devices.run import run_target
from metapool_kernels.devices.target import Int8Target, trace
from tests.devices import networks
from tests.devices.networks import CHANNELS, HEIGHT, WIDTH

pytestmark = pytest.mark.devices

TARGETS = os.environ.get("METAPOOL_DEVICE", "onnx onnx_int8").split()
IN_INTEGERS = [name for name in TARGETS if isinstance(load_target(name), Int8Target)]
EXACT = [name for name in TARGETS if name not in IN_INTEGERS]
TOLERANCE = 1e-5
"""Of the largest output."""
INTEGER_TOLERANCE = 0.05
"""Of the outputs' root mean square. A 256th of a range is lost at every step of several."""

SMALL = (CHANNELS, HEIGHT, WIDTH)
NETWORKS = {
    "counted": (lambda: networks.EveryPooling(1, True), SMALL),
    "uncounted": (lambda: networks.EveryPooling(1, False), SMALL),
    "counted, stride 2": (lambda: networks.EveryPooling(2, True), SMALL),
    "uncounted, stride (2, 1)": (lambda: networks.EveryPooling((2, 1), False), SMALL),
    "averages of others": (networks.AveragesOfOthers, SMALL),
    "attention": (networks.attention, SMALL),
    "shared heads": (networks.SharedHeads, SMALL),
    "mobile": (networks.mobile, (3, 64, 64)),
}

# XNNPACK takes no maximum whose stride is larger than its window, no average whose windows go
# beyond the padding, and no step of a slice, by which averages with a stride that do not count
# their padding are written.
OUTSIDE = {
    "counted, stride 2": {"aten::max_pool2d_with_indices"},
    "uncounted, stride (2, 1)": {"aten::max_pool2d_with_indices", "aten::slice_copy.Tensor"},
    "averages of others": {"aten::avg_pool2d", "aten::slice_copy.Tensor"},
}

Arrays = Mapping[str, NDArray[np.float32]]


def differences(network: nn.Module, cases: Mapping[str, Tensor], outputs: Arrays) -> dict[str, str]:
    """By case what is further from the truth than it may be, in words."""
    found = {}
    for name, batch in cases.items():
        wanted = networks.truth(network, batch)
        with torch.inference_mode():
            own = (network(batch) - wanted).abs().max()
        # An error of float32 itself, which the order of a sum decides, is nobody's fault.
        allowed = max(TOLERANCE * wanted.abs().max(), 4 * own)
        got = torch.from_numpy(outputs[name])
        assert got.shape == wanted.shape
        largest = (got - wanted).abs().max()
        if not largest <= allowed:
            found[name] = f"{largest:.2g} where {allowed:.2g} is allowed"
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", EXACT)
def test_outputs(target: str, name: str) -> None:
    make, shape = NETWORKS[name]
    network = make().eval()
    cases = {
        f"{kind}, {batch}": images
        for batch in (1, 4)
        for kind, images in networks.images(batch, shape).items()
    }
    program = trace(network, shape, load_target(target).form)
    answer = run_target(
        target, {"network": program}, cases={key: batch.numpy() for key, batch in cases.items()}
    )
    assert not differences(network, cases, answer.outputs)
    assert answer.files
    if target == "executorch":
        assert set(answer.outside or ()) == OUTSIDE.get(name, set())
    else:
        assert answer.outside is None


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", IN_INTEGERS)
def test_integers(target: str, name: str) -> None:
    make, shape = NETWORKS[name]
    network = make().eval()
    noise = torch.randn(48, *shape, generator=torch.Generator().manual_seed(0))
    calibration, images = noise.split(32)
    answer = run_target(
        target,
        {"network": trace(network, shape, load_target(target).form)},
        singles={"noise": images.numpy()},
        calibration=calibration.numpy(),
    )
    assert not too_far(network, images, answer.outputs["noise"])
    if target == "executorch_int8":
        assert set(answer.outside or ()) == OUTSIDE.get(name, set())


def too_far(network: nn.Module, images: Tensor, outputs: NDArray[np.float32]) -> str:
    """How far outputs are from the truth, if that is further than integers may be."""
    wanted = networks.truth(network, images)
    error = (torch.from_numpy(outputs) - wanted).square().mean().sqrt()
    size = wanted.square().mean().sqrt()
    return "" if error <= INTEGER_TOLERANCE * size else f"{error / size:.1%}"


def test_too_far_speaks() -> None:
    network = networks.EveryPooling(1, True).eval()
    images = torch.randn(2, *SMALL, generator=torch.Generator().manual_seed(0))
    right = networks.truth(network, images).float()
    assert not too_far(network, images, (1.04 * right).numpy())
    assert too_far(network, images, (1.06 * right).numpy()) == "6.0%"
    assert too_far(network, images, (right * torch.nan).numpy())


def test_differences_speak() -> None:
    network = networks.EveryPooling(1, True).eval()
    cases = networks.images(1, SMALL)
    wrong = {}
    for name, batch in cases.items():
        out = networks.truth(network, batch).float()
        wrong[name] = out.clone().numpy()
        wrong[name][0, -1] += 2e-5 * out.abs().max().item() + (name == "zeros")
    assert differences(network, cases, wrong).keys() == cases.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_one_thread(target: str, tmp_path: Path) -> None:
    # Large enough that a runtime would share it out.
    network = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)), nn.Flatten())
    program = trace(network, (64, 48, 48), load_target(target).form)
    images = torch.randn(1, 64, 48, 48).numpy()
    runtime = load_target(target)
    if isinstance(runtime, Int8Target):
        runtime.calibrate(images)
    runtime.convert(program, tmp_path, 1)
    run = runtime.load(tmp_path, 1)
    run(images)
    threads = len(os.listdir("/proc/self/task"))
    wall, cpu = time.perf_counter(), _cpu()
    for _ in range(20):
        run(images)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    assert cpu <= 1.15 * wall, (cpu, wall, threads)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
