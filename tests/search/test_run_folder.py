"""Files written whole or not at all, and runs that are not overwritten."""

import os
import shlex
from pathlib import Path

import pytest
import torch

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import load_config, to_yaml

SECTIONS = ("seed", "search")


def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.write("metrics.csv", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run.write("metrics.csv", "new and longer")
    assert (tmp_path / "metrics.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there while the new content is being written is the old content."""
    run = RunFolder(tmp_path)
    run.write("a/b.json", "old")
    seen = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append((tmp_path / "a/b.json").read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    run.write("a/b.json", "new")
    assert seen == ["old"]
    assert (tmp_path / "a/b.json").read_text() == "new"


def test_the_old_file_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write("metrics.csv", "old")
    with (tmp_path / "metrics.csv").open() as reader:
        run.write("metrics.csv", "new and longer")
        assert reader.read() == "old"


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.load_checkpoint() is None
    weight = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    state = {"epoch": 2, "rng": torch.get_rng_state(), "stops": [{"keep": (1,)}]}
    run.save_checkpoint(Checkpoint({"w": torch.zeros(1)}, {"epoch": 1}), 1)
    run.save_checkpoint(Checkpoint({"w": weight}, state), 2)
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded.weights["w"], weight)
    assert loaded.state["epoch"] == 2
    assert loaded.state["stops"] == state["stops"]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "state.pt",
        "weights-0002.safetensors",
    ]


def test_a_kill_between_the_two_files_leaves_the_last_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint(Checkpoint({"w": torch.ones(1)}, {"epoch": 1}), 1)
    write = RunFolder.write

    def killed(self: RunFolder, name: str, content: str | bytes) -> None:
        if name.endswith("state.pt"):
            raise KeyboardInterrupt
        write(self, name, content)

    monkeypatch.setattr(RunFolder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(Checkpoint({"w": torch.zeros(1)}, {"epoch": 2}), 2)
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert (loaded.state["epoch"], loaded.weights["w"].item()) == (1, 1.0)


@pytest.mark.parametrize("name", ["state.pt", "weights-0001.safetensors"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint(Checkpoint({"w": torch.ones(1)}, {"epoch": 1}), 1)
    file = tmp_path / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged"):
        run.load_checkpoint()


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("executed",))


def test_a_checkpoint_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    torch.save({"epoch": Malicious()}, tmp_path / "checkpoint" / "state.pt")
    with pytest.raises(UserError, match="is damaged"):
        RunFolder(tmp_path).load_checkpoint()
    assert not (tmp_path / "executed").exists()


def test_a_second_run_is_refused_and_overwriting_keeps_foreign_files(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path), Config(output=str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    run.begin(config, SECTIONS, resume=False, overwrite=False)
    run.write("metrics.csv", "numbers")
    run.write("adapt/config.yaml", "settings")
    with pytest.raises(UserError, match="--resume"):
        run.begin(config, SECTIONS, resume=False, overwrite=False)
    assert (tmp_path / "metrics.csv").read_text() == "numbers"
    run.begin(config, SECTIONS, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]


def test_resuming_asks_for_the_same_settings(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path), Config(output=str(tmp_path))
    with pytest.raises(UserError, match="no run"):
        run.begin(config, SECTIONS, resume=True, overwrite=False)
    run.begin(config, SECTIONS, resume=False, overwrite=False)
    config.adapt.epochs = 7
    run.begin(config, SECTIONS, resume=True, overwrite=False)
    config.search.stop.delta = 0.4
    with pytest.raises(UserError, match=r"search\.stop\.delta: 0\.2 -> 0\.4"):
        run.begin(config, SECTIONS, resume=True, overwrite=False)


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path / "run"), Config(output="run")
    sections = ("data", "model")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").write_bytes(b"the same")
    config.model.weights = str(tmp_path / "one" / "weights")
    config.data.root = "images"
    run.begin(config, sections, resume=False, overwrite=False)
    config.data.root, config.data.workers, config.data.download = "./images", 3, True
    config.model.weights = str(tmp_path / "two" / ".." / "two" / "weights")
    run.check_settings(config, sections)
    Path(config.model.weights).write_bytes(b"others, ")
    for weights in (config.model.weights, str(tmp_path / "none"), None):
        config.model.weights = weights
        with pytest.raises(UserError, match=r"model\.weights: .*/one/weights -> "):
            run.check_settings(config, sections)


def test_advice_can_be_pasted(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path / "my run"), Config(output="x")
    run.begin(config, SECTIONS, resume=False, overwrite=False)
    config.seed = 3
    with pytest.raises(UserError) as refused:
        run.check_settings(config, SECTIONS)
    assert shlex.split(str(refused.value))[-1] == str(run / "config.yaml")


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    config = Config(output="somewhere", seed=5)
    config.model.arguments = {"output_stride": 4, "drop_rate": 0.1}
    config.search.alpha.betas = (0.25, 0.5)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
