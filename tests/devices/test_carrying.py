"""What carries a network to a runtime: processes, reasons, timing; test_targets.py has these."""

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from metapool_kernels import MetaPool2d, SpatialEnhancer
from metapool_kernels.devices import latency, run
from metapool_kernels.devices.registry import (
    NAMES,
    extra,
    load_target,
    missing_packages,
    target_names,
)
from metapool_kernels.devices.run import TargetError, measure_networks, run_target
from metapool_kernels.devices.target import image_shape, trace, with_batch
from metapool_kernels.devices.targets.executorch import _step_behind_averages
from metapool_kernels.devices.targets.executorch_int8 import _averages_as_convolutions
from metapool_kernels.devices.targets.onnx_int8 import OnnxInt8
from metapool_kernels.devices.worker import _in_one_line
from metapool_kernels.plain import FORM
from tests.devices.networks import AveragesOfOthers

SHAPE = (3, 8, 6)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), SpatialEnhancer(4), nn.Flatten())
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def test_a_trace_takes_any_batch_or_one_alone() -> None:
    model = network()
    program = trace(model, SHAPE, FORM)
    assert image_shape(program) == SHAPE
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    four = with_batch(program, 4).module()
    assert four(torch.randn(4, *SHAPE)).shape == (4, 192)
    with pytest.raises(AssertionError):
        four(x)
    assert isinstance(model[1], SpatialEnhancer) and model[0].weight.stride()[1] == 1


def test_activations_are_traced_out_of_place() -> None:
    """Converters have no rule for others; the network itself keeps them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.Flatten()).eval()
    targets = {str(node.target) for node in trace(model, SHAPE, FORM).graph.nodes}
    assert "aten.hardtanh.default" in targets or "aten.relu6.default" in targets, targets
    assert not [target for target in targets if target.endswith("_.default")]
    assert model[1].inplace


def test_a_trace_is_contiguous_whatever_the_network_was() -> None:
    """Of channels_last some runtimes take nothing, and converters write copies of it for others."""
    program = trace(network(), SHAPE, FORM)
    for tensor in program.state_dict.values():
        assert tensor.is_contiguous()
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if "clone" in target or "as_strided" in target]


@pytest.mark.parametrize("rewrite", [_step_behind_averages, _averages_as_convolutions])
def test_averages_that_are_written_anew_compute_the_same(
    rewrite: Callable[[GraphModule], None],
) -> None:
    model = AveragesOfOthers(divisor=5, ceil_mode=True).eval()
    module = trace(model, SHAPE, FORM).module()
    before = [node.target for node in module.graph.nodes]
    rewrite(module)
    assert [node.target for node in module.graph.nodes] != before
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(module(x), model(x))


def test_targets_by_name() -> None:
    assert target_names(["onnxruntime", "ncnn", "onnx"]) == ["onnx", "ncnn"]
    assert extra("onnx_int8") == extra("onnx") == "export" and extra("ncnn") == "ncnn"
    for names, message in (([], "no target is given; there are onnx, "), (["tflite"], "'tflite'")):
        with pytest.raises(ValueError, match=message):
            target_names(names)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_target_needs_is_known_where_it_is_not_installed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = load_target(name).packages
    assert packages
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    assert missing_packages(load_target(name)) == list(packages)
    with pytest.raises(TargetError, match=rf'pip install "metapool_kernels\[{extra(name)}\]"'):
        run.check_installed(name)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))


def test_what_a_converter_cannot_take_is_told_in_one_line() -> None:
    with pytest.raises(TargetError, match="bessel_j0") as caught:
        run_target("onnx", {"it": trace(Unknown(), SHAPE, FORM)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo loading; kill -SEGV $$", "ended by SIGSEGV; its last words: loading"),
        ("exit 3", r"ended with 3; its last words: \(none\)"),
        ("true", "ended with 0"),
    ],
)
def test_a_runtime_that_crashes_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    program = trace(nn.Flatten(), SHAPE, FORM)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(TargetError, match=message):
        run_target("onnx", {"it": program})


def test_ctrl_c_in_a_worker_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    # What runs in the background ignores the signal, and its children do so too.
    lines = ("import os, signal", "signal.signal(2, signal.SIG_DFL)", "os.kill(os.getpid(), 2)")
    python.write_text("\n".join((f"#!{sys.executable}", *lines)))
    python.chmod(0o755)
    program = trace(nn.Flatten(), SHAPE, FORM)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(KeyboardInterrupt):
        run_target("onnx", {"it": program})


def test_a_worker_answers_with_what_the_runtime_computes() -> None:
    model = network()
    cases = {str(n): np.random.default_rng(n).random((n, *SHAPE), np.float32) for n in (1, 4)}
    answer = run_target("onnx", {"it": trace(model, SHAPE, FORM)}, cases=cases)
    assert answer.files.keys() == {"network.onnx"} and answer.latencies == {}
    assert answer.outside is None and answer.versions["onnxruntime"]
    for case, images in cases.items():
        expected = model(torch.from_numpy(images)).detach()
        torch.testing.assert_close(
            torch.from_numpy(answer.outputs[case]), expected, rtol=1e-5, atol=1e-5
        )


def test_ranges_of_integers_are_read_off_the_images() -> None:
    """Of images a hundred times as large, nothing can be told apart."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), SpatialEnhancer(4), nn.Flatten()).eval()
    images = np.random.default_rng(0).standard_normal((4, *SHAPE), np.float32)
    expected = model(torch.from_numpy(images)).detach().numpy()
    errors = {}
    for scale in (1, 100):
        answer = run_target(
            "onnx_int8",
            {"it": trace(model, SHAPE, FORM)},
            cases={"four": images},
            singles={"one at a time": images},
            calibration=scale * images,
        )
        assert answer.files.keys() == {"network.int8.onnx"}
        four, each = answer.outputs["four"], answer.outputs["one at a time"]
        np.testing.assert_array_equal(four, each)
        errors[scale] = np.abs(four - expected).max() / np.abs(expected).max()
    assert errors[1] < 0.03 < 0.3 < errors[100]


def test_onnxruntime_pools_in_integers(tmp_path: Path) -> None:
    """Whatever was chosen, in what onnxruntime makes of the file when it loads it."""
    mixture = SpatialEnhancer(4, ("max_pool_3x3", "avg_pool_3x3", "avg_pool_7x7", "skip_connect"))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), mixture, nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    target = OnnxInt8()
    target.calibrate(np.random.default_rng(0).standard_normal((8, *SHAPE), np.float32))
    target.convert(trace(model, SHAPE, target.form), tmp_path, 1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / target.file, options, ["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert operators.count("QLinearAveragePool") == 3
    assert operators.count("QLinearConv") == 2 and operators.count("QLinearAdd") == 4
    assert not {"AveragePool", "Pad", "Conv", "Add"} & set(operators)


@pytest.mark.costly
def test_networks_of_several_sizes_are_timed_beside_each_other() -> None:
    one = nn.Sequential(nn.Conv2d(2, 8, 3), MetaPool2d(["max_pool_3x3"]), nn.Flatten())
    networks = {"small, it is": one, "large / one": one}
    shapes = {"small, it is": (2, 8, 8), "large / one": (2, 256, 256)}
    found = measure_networks("onnxruntime", networks, shapes, samples=5)
    assert found.keys() == networks.keys()
    for times in found.values():
        assert 0 < times.lower <= times.median <= times.upper


def test_samples_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SAMPLE", 0.0)
    calls: list[str] = []
    found = latency.interleaved({name: lambda n=name: calls.append(n) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(calls) == "aaaabbbbcccc" + "abc" + "cba"
    assert all(len(times) == 3 for times in found.values())


def test_an_interruption_leaves_samples_as_long_as_they_should_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each run takes a tenth of a millisecond but for the first that is looked at, a second."""
    now, runs = [0.0], count()

    def run() -> None:
        now[0] += 1.0 if next(runs) == 1 else 1e-4

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = latency.interleaved({"it": run}, 2)
    assert found["it"].median == pytest.approx(1e-4)
    assert next(runs) > 4 + 2 * 20, "two samples of twenty runs"


def test_the_worker_says_what_is_at_the_root() -> None:
    error = RuntimeError("\n\nconversion failed\nsee above")
    error.__cause__ = KeyError("layer")
    assert _in_one_line(error) == "RuntimeError: conversion failed <- KeyError: 'layer'"
    assert _in_one_line(ValueError()) == "ValueError"
