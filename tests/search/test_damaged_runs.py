"""The command line on damaged files: one line, exit code 2, and the folder as it was."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from metapool_kernels.search.cli import main
from tests.search.runs import options
from tests.search.test_damaged_files import Wicked


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))


def _newest_weights(folder: Path) -> Path:
    (path,) = (folder / "checkpoint").glob("weights-*.safetensors")
    return path


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "architecture cut": ("adapt", lambda f: _cut(f / "architecture.json"), "architecture.json"),
    "architecture newer": ("evaluate", lambda f: _newer(f / "architecture.json"), "version 2"),
    "architecture foreign": ("export", lambda f: (f / "architecture.json").write_text("{}"),
                             "not an architecture file"),
    "plot of a cut one": ("plot", lambda f: _cut(f / "architecture.json"), "architecture.json"),
    "split cut": ("adapt", lambda f: _cut(f / "split.json"), "split.json"),
    "state cut": ("resume", lambda f: _cut(f / "checkpoint/state.pt"), "is damaged"),
    "weights cut": ("resume", lambda f: _cut(_newest_weights(f)), "is damaged"),
    "state wicked": ("resume", lambda f: torch.save({"epoch": Wicked()}, f / "checkpoint/state.pt"),
                     "is damaged or was not written by a search"),
    "settings cut": ("resume", lambda f: (f / "config.yaml").write_text("seed: 0\nsearch: {"),
                     "config.yaml"),
    "settings wicked": ("resume", lambda f: (f / "config.yaml").write_text(
        "seed: !!python/object/apply:os.mkdir [executed]"), "config.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_explained_on_one_line_and_left_alone(
    damage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command, change, named = DAMAGES[damage]
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    change(folder)
    monkeypatch.chdir(tmp_path)
    before = _digests(tmp_path)
    arguments = options(folder)
    call = ["search", *arguments, "--resume"] if command == "resume" else [command, *arguments]
    assert main(call) == 2
    # The images are looked at before the checkpoint is, and few of them earn a warning.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert line.startswith("metapool: ") and named in line
    assert _digests(tmp_path) == before
    assert not os.path.exists("executed")


YAML: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": ("sed: 3\n", "'sed'"),
    "an unknown key below": ("search: {alpha: {larning: 3}}\n", "search.alpha.larning"),
    "a function to call": ("seed: !!python/object/apply:os.mkdir [executed]\n", "os.mkdir"),
    "a file that is a call": ("!!python/object/apply:os.mkdir [executed]\n", "os.mkdir"),
    "a call among arguments": (
        "model: {arguments: {a: !!python/object/apply:os.mkdir [executed]}}\n", "os.mkdir"),
    "an object to make": ("seed: !!python/object/new:os.mkdir [executed]\n", "os.mkdir"),
    "a name to import": ("seed: !!python/name:os.mkdir\n", "os.mkdir"),
    # jsonargparse names the class or, in older versions, the setting that it would have.
    "another class": ("model: {class_path: os.mkdir, init_args: {path: executed}}\n", "path"),
    "a model that is a call": (
        "model: {name: 'os:mkdir', arguments: {path: executed}}\n", "os:mkdir"),
    "no text": (b"\xff\xfe\x00\x01\x80", "strange.yaml"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "strange.yaml"),
    "a zero": ("seed: 3\0", "strange.yaml"),
    "nested too deeply": ("[" * 100_000, "strange.yaml"),
    "a list": ("- 1\n", "strange.yaml"),
    "nothing": ("", "strange.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", YAML)
def test_strange_settings_are_explained_and_nothing_is_written_or_executed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, named = YAML[case]
    monkeypatch.chdir(tmp_path)
    Path("strange.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["search", "--config", "strange.yaml", "--output", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("metapool: ") and named in line
    assert os.listdir() == ["strange.yaml"]
