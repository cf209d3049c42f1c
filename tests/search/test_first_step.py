"""What will not work is said in one line before anything is written, and trying leaves no trace."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from metapool_kernels.search.cli import main
from metapool_kernels.search.training import first_step
from metapool_kernels.search.training.loop import Search
from tests.search.runs import SHALLOW, metrics, options

pytestmark = [
    pytest.mark.usefixtures("quick_pictures"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*requires_grad=True"),
]


def search(name: str, folder: Path, **changes: Any) -> int:
    network = {"model__name": f"tests.search.networks:{name}", "model__insert_after": "mid"}
    settings = SHALLOW | {"model__arguments": {}, "search__epochs": 4} | network | changes
    return main(["search", *options(folder, **settings)])


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("held", {}, "holds on to its own tensors"),
        ("held", {"search__alpha__method": "second-order", "precision": "bf16"}, "holds on to"),
        ("scripted", {}, "holds on to its own tensors"),
        ("reentrant", {}, "use_reentrant"),
        ("several", {}, r"it should give \(16, classes\) numbers, got <class 'tuple'>"),
        ("no_backward", {}, "there is no such gradient"),
        ("few_classes", {}, r"cannot train on batches of \(16, 1, 16, 16\)"),
        ("not_a_number", {}, "the loss of the first step is nan"),
    ],
)
def test_what_cannot_be_searched_is_said_and_nothing_begun(
    name: str,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert search(name, tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("metapool: ")
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["recomputed", "unsteady"])
def test_what_can_be_searched_is(name: str, tmp_path: Path) -> None:
    """A network that computes something else each time tells nothing, and is not refused."""
    assert search(name, tmp_path / "run", search__alpha__method="second-order") == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name, warned", [("softmax", True), ("log_softmax", False)])
def test_a_network_that_ends_in_a_softmax_is_warned_about(
    name: str, warned: bool, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss takes one itself; of log_softmax it makes the same."""
    first_order = {"search__alpha__method": "first-order"}
    assert search(name, tmp_path / "run", precision=precision, **first_order) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "softmax" in line]
    expected = f"metapool: warning: 'tests.search.networks:{name}' ends in a softmax"
    assert len(warnings) == warned and all(line.startswith(expected) for line in warnings)


@pytest.mark.costly
def test_gradient_checkpointing_of_timm_changes_no_number(tmp_path: Path) -> None:
    folders = tmp_path / "saving", tmp_path / "plain"
    own = {"model__name": "tests.search.networks:saving", "model__arguments": {}}
    timm = {"model__name": "mobilenetv2_035", "model__arguments": {"output_stride": 4}}
    for folder, network in zip(folders, (own, timm), strict=True):
        assert main(["search", *options(folder, search__epochs=4, **network)]) == 0
    saved, plain = map(metrics, folders)
    assert len(saved) == len(plain)
    for one, other in zip(saved, plain, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)


@pytest.mark.parametrize("method", ["first-order", "second-order"])
def test_a_first_step_leaves_no_trace(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Search, dict[str, torch.Tensor]]] = []
    check = first_step.check_first_step
    losses: list[torch.Tensor] = []

    def noting(trained: Search) -> None:
        before = {n: t.clone() for n, t in trained.upper.supernet.model.state_dict().items()}
        take = Search.take_first_step

        def stepping(self: Search, *batches: Any) -> list[torch.Tensor]:
            found = take(self, *batches)
            after = self.upper.supernet.model.state_dict()
            assert any(not torch.equal(after[name], before[name]) for name in before)
            losses.extend(found)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(Search, "take_first_step", stepping)
            check(trained)
        seen.append((trained, before))
        raise KeyboardInterrupt

    monkeypatch.setattr("metapool_kernels.search.commands.search.check_first_step", noting)
    assert search("recomputed", tmp_path / "run", search__alpha__method=method) == 130
    ((trained, before),) = seen
    assert len(losses) == 2
    after = trained.upper.supernet.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in trained.upper.supernet.model.parameters())
    alphas = trained.upper.supernet.alphas(trained.layers)
    assert not any(alpha.requires_grad for alpha in alphas)
    assert not trained.weight_optimizer.state and not trained.upper.alpha_optimizer.state
    assert not trained.upper.stopping.averages
    assert not (tmp_path / "run").exists()


def test_a_step_without_kernels_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels are compiled ahead, a first step is taken with anything in their place."""
    assert search("recomputed", tmp_path / "plain") == 0
    ran = []

    def without_kernels(step: Callable[[], object], accelerator: Accelerator) -> int:
        with monkeypatch.context() as patched:
            patched.setattr(
                "metapool_kernels.nn.fused_meta_pool", lambda x, *_, **__: x * torch.nan
            )
            step()
        ran.append(step)
        return 0

    monkeypatch.setattr(first_step, "compile_ahead", without_kernels)
    assert search("recomputed", tmp_path / "ahead") == 0
    assert len(ran) == 1
    plain, ahead = metrics(tmp_path / "plain"), metrics(tmp_path / "ahead")
    assert [row["loss"] for row in ahead] == [row["loss"] for row in plain]
