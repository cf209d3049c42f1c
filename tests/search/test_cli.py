"""Mistakes end with exit code 2, one line on stderr, and nothing overwritten."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from metapool_kernels.search.cli import main
from tests.search.runs import CONFIG, options

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"model__name": "mobilenet_v9"}, "mobilenet_v9"),
    "argument the model lacks": ({"model__arguments": {"outputs": 4}}, "outputs"),
    "pattern without match": ({"model__insert_after": "blocks.*bn9"}, "matches no module"),
    "pattern that is none": ({"model__insert_after": "("}, "no regular expression"),
    "unknown candidate": ({"model__candidates": ["max_pool_4x4"]}, "max_pool_4x4"),
    "no candidate": ({"model__candidates": []}, "candidates is empty"),
    "wrong type": ({"search__epochs": "many"}, "search.epochs"),
    "negative number": ({"data__batch_size": -1}, "data.batch_size"),
    "share above one": ({"search__stop__delta": 1.5}, "search.stop.delta"),
    "unknown choice": ({"data__kind": "mnist"}, "data.kind"),
    "folder not named": ({"data__kind": "folder"}, "data.root"),
    "folder not there": ({"data__kind": "folder", "data__root": "/no/such"}, "/no/such"),
    "alpha never trained": ({"search__warmup": 0.9}, "alpha is never trained"),
    "unknown key": ({"search__epoch": 3}, "search.epoch"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_on_one_line(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, named = MISTAKES[mistake]
    present = tmp_path / "run"
    present.mkdir()
    (present / "config.yaml").write_text("seed: 1")
    assert main(["search", *options(present, **changes), "--overwrite"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("metapool: ") and named in line
    assert captured.out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "config.yaml"]
    assert (present / "config.yaml").read_text() == "seed: 1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("serach: {epochs: 3}", "serach"),
        ("search: {epoch: 3}", "epoch"),
        ("a: [", "config"),
        (None, "yaml"),
    ],
)
def test_a_wrong_file_is_explained_on_one_line(
    text: str | None, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["search", "--config", str(file), "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert main(["search", *options(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(output) in line
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("extra", [[], ["--resume", "--search.stop.delta=0.4"]])
def test_a_second_run_into_the_same_folder_is_refused(
    finished: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["search", *options(finished), *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--overwrite" in line or "search.stop.delta: 0.1 -> 0.4" in line
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "search,adapt,evaluate"), (["sarch"], "sarch"), (["search"], "output")],
)
def test_a_command_that_is_none(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("command", ["adapt", "evaluate"])
def test_a_search_that_is_not_finished(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *options(tmp_path / "run")]) == 2
    assert "run 'metapool search'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_printed_configuration_is_the_whole_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", "--config", str(CONFIG), "--search.stop.delta=0.35", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["search"]["stop"]["delta"] == 0.35
    assert printed["search"]["alpha"]["betas"] == [0.5, 0.999]
    assert printed["model"]["name"] == "mobilenetv2_035"


def test_a_diverged_search_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"search__weights__lr": 1e30, "search__weights__clip": 1e30}
    assert main(["search", *options(tmp_path / "run", **changes)]) == 2
    assert "lower the learning rate" in capsys.readouterr().err.splitlines()[-1]
