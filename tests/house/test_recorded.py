"""Figures of a version: compared under that one, skipped under any other, never lost silently."""

import json
from pathlib import Path

import pytest
import torch

from tests import recorded
from tests.pytorch import pytorch_internal
from tests.recorded import Ratchet, assert_no_worse, minor

TABLES = {
    "3.8 for sm_90": {"a": {"registers": 20, "spilled": 8}},
    "3.10 for sm_80": {"a": {"registers": 12}},
    "3.10 for sm_90": {"a": {"registers": 10}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "figures.json"
    file.write_text(recorded.as_text(TABLES))
    return file


@pytest.mark.parametrize("version", ["3.8", "3.8.1", "3.8.0+git12", "3.8a0"])
def test_a_version_is_known_by_its_first_two_numbers(version: str) -> None:
    assert minor(version) == "3.8"


def _ratchet(path: Path, version: str, capability: int = 90) -> Ratchet:
    return Ratchet(path, "Triton", version, capability)


def test_each_version_and_architecture_has_figures_of_its_own(path: Path) -> None:
    assert _ratchet(path, "3.8").kept("a") == {"registers": 20, "spilled": 8}
    assert _ratchet(path, "3.10").kept("a") == {"registers": 10}
    assert _ratchet(path, "3.10", 80).kept("a") == {"registers": 12}


@pytest.mark.parametrize("version", ["3.1", "3.9", "4.0"])
def test_another_version_is_skipped_and_says_why(path: Path, version: str) -> None:
    message = rf"no figures were recorded under Triton {version} for sm_90, but under 3\.8 for sm"
    with pytest.raises(pytest.skip.Exception, match=message):
        _ratchet(path, version).kept("a")


def test_a_kernel_without_figures_under_a_known_version_fails(path: Path) -> None:
    with pytest.raises(AssertionError, match=r"has no 'b' under Triton 3\.8 for sm_90"):
        _ratchet(path, "3.8").kept("b")


def test_what_is_worse_by_more_than_the_slack_fails() -> None:
    kept = {"registers": 100, "spilled": 0}
    assert_no_worse({"registers": 110, "spilled": 0}, kept, *kept)
    for worse in ({"registers": 111, "spilled": 0}, {"registers": 90, "spilled": 8}):
        with pytest.raises(AssertionError, match="than when this was last improved"):
            assert_no_worse(worse, kept, *kept)


def test_recording_leaves_other_versions_alone(path: Path) -> None:
    _ratchet(path, "3.9").record("a", {"registers": 15})
    _ratchet(path, "3.8").record("a", {"registers": 19})
    found = json.loads(path.read_text())
    names = [f"{version} for sm_{c}" for version, c in (("3.8", 90), ("3.9", 90), ("3.10", 80))]
    assert list(found) == [*names, "3.10 for sm_90"]
    assert [found[name]["a"]["registers"] for name in found] == [19, 15, 12, 10]


def test_samples_of_a_torch_that_nobody_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is not asserted, and a module that is gone is a reason to skip."""
    pytest.importorskip("expecttest")
    monkeypatch.setattr(torch, "__version__", f"{recorded.TORCH[-1]}.3+cpu")
    recorded.require_counted_torch()
    with pytest.raises(ModuleNotFoundError):
        pytorch_internal.load("no_such_module")
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    with pytest.raises(pytest.skip.Exception, match=r"this is 99\.0\.0"):
        recorded.require_counted_torch()
    with pytest.raises(pytest.skip.Exception, match=r"torch 99\.0\.0"):
        pytorch_internal.load("no_such_module")
