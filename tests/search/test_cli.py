"""Mistakes end with exit code 2, one line on stderr, and nothing overwritten."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metapool_kernels.search.cli import main
from metapool_kernels.search.settings.config_file import load_config
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
    "more than 32 bits hold": ({"search__weights__lr": 1e300}, "search.weights.lr"),
    "threads without end": ({"threads": 100_000}, "threads"),
    "optimizer of second order": ({"search__weights__optimizer": "adahessian"}, "adahessian"),
    "candidate twice": ({"model__candidates": ["none", "none"]}, "names one twice: none, none"),
    "endless rate": ({"search__weights__lr": float("inf")}, "search.weights.lr"),
    "endless tilt": ({"search__alpha__tilt": float("inf")}, "search.alpha.tilt"),
    "endless penalty": ({"adapt__weights__weight_decay": float("inf")}, "weight_decay"),
    "decay of one": ({"search__alpha__betas": [0.5, 1.0]}, "search.alpha.betas"),
    "seed too large": ({"seed": 2**64, "data__kind": "mnist5k"}, "seed"),
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
        ("seed: 1\nmodel:", "section 'model' is empty"),
        ("search:\n  stop:", "section 'search.stop' is empty"),
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


def test_help_and_mistakes_wait_for_nothing_but_torch() -> None:
    """timm, which brings torchvision, takes as long to import as torch itself."""
    code = (
        "import sys\n"
        "from metapool_kernels.search.cli import main\n"
        "assert main(['search', '--search.epochs', 'many']) == 2\n"
        "print(*{'timm', 'torchvision', 'sklearn', 'matplotlib', 'accelerate'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "search.epochs" in done.stderr and not done.stdout.split()


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


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The settings that a call would have."""
    with pytest.raises(SystemExit) as ended:
        main(["search", *arguments, "--print_config"])
    assert ended.value.code == 0
    settings: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return settings


ORDERED = [
    ["--config=one.yaml"],
    ["--config", "two.yaml"],
    ["--search", "{epochs: 3, warmup: 0.3}"],
    ["--search.epochs", "4"],
    ["--model.arguments", "{a: 1}"],
    ["--model.arguments.b=2"],
    ["--output=here"],
]
"""From the widest to the narrowest; of the two files the later one wins."""


@pytest.mark.parametrize("moved", range(2, len(ORDERED)))
@pytest.mark.parametrize("place", [0, len(ORDERED)])
def test_options_win_over_files_wherever_they_stand(
    moved: int,
    place: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("{output: one, seed: 1, search: {epochs: 1, alpha_half: 0.1}}")
    Path("two.yaml").write_text("{output: two, search: {epochs: 2, warmup: 0.2}}")
    order = [*ORDERED[:moved], *ORDERED[moved + 1 :]]
    order.insert(place, ORDERED[moved])
    settings = printed([text for option in order for text in option], capsys)
    assert (settings["output"], settings["seed"]) == ("here", 1)
    assert settings["model"]["arguments"] == {"a": 1, "b": 2}
    search = settings["search"]
    assert (search["epochs"], search["warmup"], search["alpha_half"]) == (4, 0.3, 0.1)


def test_overwriting_means_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept, named = tmp_path / "kept", tmp_path / "named"
    for folder in (kept, named):
        (folder / "adapt").mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 1")
    Path("kept.yaml").write_text("output: kept")
    small = options(named)[:-1]
    assert main(["search", "--output=named", "--overwrite", *small, "--config=kept.yaml"]) == 0
    assert "deleting from 'named': config.yaml, adapt" in capsys.readouterr().out
    assert (kept / "config.yaml").read_text() == "seed: 1" and (kept / "adapt").is_dir()
    assert (named / "architecture.json").exists() and not (named / "adapt").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["--config=a.yaml", "--config=b.yaml", "--overwrite"],
            "one and two; say which one",
        ),
        (["--config=a.yaml", "--overwrite", "--resume"], "not allowed with argument"),
    ],
)
def test_what_to_overwrite_is_not_guessed(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, output in (("a", "one"), ("b", "two")):
        Path(f"{name}.yaml").write_text(f"output: {output}")
        Path(output).mkdir()
        Path(output, "config.yaml").write_text("seed: 1")
    for command in ("search", "adapt"):
        assert main([command, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert [Path(output, "config.yaml").read_text() for output in ("one", "two")] == ["seed: 1"] * 2


TWICE = {
    "a section": "search: {epochs: 3}\nsearch: {warmup: 0.2}",
    "a setting": "search: {epochs: 3, epochs: 4}",
    "with a dot": "search: {warmup: 0.2}\nsearch-x: 3\nsearch.epochs: 3",
    "in a list": "model: {arguments: {stages: [{a: 1, a: 2}]}}",
    "where it is referred to": "search: {weights: &w {lr: 1, lr: 2}}\nadapt: {weights: *w}",
}


@pytest.mark.parametrize("case", TWICE)
def test_a_name_that_stands_twice_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(f"output: {tmp_path / 'run'}\n{TWICE[case]}\n")
    assert main(["search", f"--config={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "twice.yaml" in line and "stands there twice" in line
    assert main(["search", *options(tmp_path / "run"), "--search={epochs: 3, epochs: 4}"]) == 2
    assert "'epochs' stands there twice" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_referred_to_may_be_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shared.yaml"
    text = "search: {weights: &w {lr: 0.5, clip: 1}}\nadapt: {weights: {<<: *w, clip: 2}}"
    file.write_text(f"output: run\n{text}\n")
    weights = printed([f"--config={file}"], capsys)["adapt"]["weights"]
    assert (weights["lr"], weights["clip"]) == (0.5, 2)


def test_arguments_of_the_network_may_stand_in_several_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("one.yaml", "two.yaml")]
    files[0].write_text("{output: run, model: {arguments: {a: 1, b: 1}}}")
    files[1].write_text("model: {arguments: {b: 2, c: 2}}")
    given = [f"--config={file}" for file in files]
    assert printed(given, capsys)["model"]["arguments"] == {"a": 1, "b": 2, "c": 2}
    assert printed([*given, "--model.arguments={d: 3}"], capsys)["model"]["arguments"] == {"d": 3}


def test_no_precision_needs_no_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "no.yaml"
    file.write_text("output: run\nprecision: no\n")
    assert printed([f"--config={file}"], capsys)["precision"] == "no"
    assert printed([f"--config={file}", "--precision=bf16"], capsys)["precision"] == "bf16"
    assert load_config(file).precision == "no"


PATHS = {"output": ("output",), "root": ("data", "root"), "weights": ("model", "weights")}


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize("by_file", [True, False])
def test_every_path_is_filled_in(
    place: str,
    by_file: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.chdir(tmp_path)
    keys = PATHS[place]

    def given(path: str) -> list[str]:
        if not by_file:
            return ["--output=x", f"--{'.'.join(keys)}={path}"]
        Path("one.yaml").write_text(yaml.safe_dump({"output": "x"}))
        content: Any = path
        for key in reversed(keys):
            content = {key: content}
        Path("two.yaml").write_text(yaml.safe_dump(content))
        return ["--config=~/one.yaml", "--config=two.yaml"]

    for path, expected in (
        ("~/a b", f"{tmp_path}/a b"),
        ("${SCRATCH}/a", "/scratch/a"),
        ("$SCRATCH", "/scratch"),
        ("a~/b", "a~/b"),
    ):
        found: Any = printed(given(path), capsys)
        for key in keys:
            found = found[key]
        assert found == expected
    for path in ("~nobody_of_this_name/a", "$NOT_SET_ANYWHERE/a", "a/${NOT_SET_ANYWHERE}", ""):
        assert main(["search", *given(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert place in line and (path or "it is empty") in line
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".yaml"] * 2 * by_file
