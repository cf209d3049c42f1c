"""Files that are cut off, flipped, foreign, newer or wicked: refused, and never executed."""

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.architecture import Architecture, load_architecture, to_json
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.run import results
from metapool_kernels.search.run.results import load_results
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from tests.search.run_by_hand import architecture, evaluation, write_run

NAME = "architecture.json"


class Wicked:
    """Makes a folder named ``executed`` when it is unpickled by a reader that trusts the file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("executed",))


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("executed"))


def _refusal(read: Callable[[], object]) -> str:
    """The message, which is one line for the command line."""
    with pytest.raises(UserError) as raised:
        read()
    return " ".join(str(raised.value).split())


def _load(text: str | bytes) -> Architecture:
    Path(NAME).write_bytes(text.encode() if isinstance(text, str) else text)
    return load_architecture(Path(NAME))


TEXT = to_json(architecture())


def test_an_architecture_cut_off_at_any_byte_is_refused() -> None:
    assert _load(TEXT) == architecture()
    whole = TEXT.rstrip()
    for length in range(len(whole)):
        assert "not a complete JSON file" in _refusal(lambda n=length: _load(whole[:n]))


def test_an_architecture_with_any_byte_flipped_is_refused_or_whole() -> None:
    """A digit or a letter of a name may become another: what is asked of a file still holds."""
    draw, taken = random.Random(0), 0
    for _ in range(200):
        content = bytearray(TEXT.encode())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            found = _load(bytes(content))
        except UserError:
            continue
        taken += 1
        assert _load(to_json(found)) == found
    assert 0 < taken < 150


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]

    def put(content: Any) -> None:
        for key in way:
            content = content[key]
        content[last] = value

    return put


def _places(content: Any, path: str = "") -> Iterator[str]:
    """Every field of a JSON file, as ``layers/0/choice``."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield f"{path}{key}"
        if isinstance(value, dict | list):
            yield from _places(value, f"{path}{key}/")


CONTENT = json.loads(TEXT)
FREE = ("backbone/arguments", "versions", "extra_candidates", "insert_after_type", "format")
"""Fields that may hold anything, may be missing, or are asked about by themselves."""
FIELDS = [path for path in _places(CONTENT) if not path.startswith(FREE)]


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        *(pytest.param(v, marks=pytest.mark.costly) for v in ([[]], None, "blue", -1, 1e999)),
    ],
    ids=repr,
)
def test_a_field_of_another_type_is_refused(value: object) -> None:
    """Or it is taken for what it says, and then fits all the rest."""
    for path in FIELDS:
        content = json.loads(TEXT)
        _put(path, value)(content)
        try:
            found = _load(json.dumps(content))
        except UserError:
            continue
        assert isinstance(value, str | int), path
        assert _load(to_json(found)) == found


def test_fields_that_are_missing_or_too_many_are_refused() -> None:
    names = [path for path in FIELDS if not path.rpartition("/")[2].isdigit()]
    optional = ("/importances", "candidate_norm")  # of one rule alone, and not in older files
    for path in [path for path in names if not path.endswith(optional)]:
        content = json.loads(TEXT)
        *way, last = path.split("/")
        owner = content
        for key in way:
            owner = owner[int(key) if key.isdigit() else key]
        owner["colour"] = "blue"
        assert "not valid" in _refusal(lambda c=content: _load(json.dumps(c)))
        del owner["colour"], owner[last]
        assert "not valid" in _refusal(lambda c=content: _load(json.dumps(c)))


WRONG: dict[str, tuple[str, Any, str]] = {
    "a newer version": ("format_version", 2, "format version 2; this metapool_kernels reads 1"),
    "a version that is true": ("format_version", True, "format version True"),
    "another format": ("format", "genotype", "not an architecture file"),
    "weights that are no numbers": ("layers/0/weights/0", float("nan"), "NaN is no number"),
    "endless alpha": ("layers/0/alpha/0", float("inf"), "Infinity is no number"),
    "no layer name": ("layers/0/name", "", "different names"),
    "one layer twice": ("layers/0/name", CONTENT["layers"][1]["name"], "different names"),
    "channels below 1": ("layers/0/channels", 0, "below 1"),
    "maps below 1": ("layers/0/map_size/1", 0, "below 1"),
    "an epoch below 1": ("layers/0/epoch", 0, "below 1"),
    "images below 1": ("backbone/image_shape/0", 0, "images of shape"),
    "an unknown candidate": ("candidates/0", "conv_3x3", "conv_3x3"),
    "an unknown choice": ("layers/0/choice/0", "max_pool_9x9", "not from the candidates"),
    "an unknown reason": ("layers/0/reason", "boredom", "boredom"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_in_an_architecture_is_named(case: str) -> None:
    path, value, named = WRONG[case]
    content = json.loads(TEXT)
    _put(path, value)(content)
    assert named in _refusal(lambda: _load(json.dumps(content)))


def test_json_that_only_python_reads_is_refused() -> None:
    twice = TEXT.replace("{", '{"seed": 1,', 1)
    assert "'seed' stands there twice" in _refusal(lambda: _load(twice))
    for deep in ("[" * 10**5, '{"a":' * 10**5):
        assert "not a complete JSON file" in _refusal(lambda text=deep: _load(text))
    for foreign in (b"\x89PNG\r\n\x1a\n", b"\xff\xfe{}", b"", b"PK\x03\x04", b"\0" * 100):
        assert "not a complete JSON file" in _refusal(lambda text=foreign: _load(text))
    # Python 3.10 has had a limit of digits since 3.10.7 only.
    limit = getattr(sys, "get_int_max_str_digits", lambda: 0)()
    longest = "complete" if 0 < limit < 5000 else "the seed"
    for digits, named in ((30, "the seed should be"), (4000, "the seed"), (5000, longest)):
        long = TEXT.replace('"seed": ', '"seed": 1' + "0" * digits)
        assert named in _refusal(lambda text=long: _load(text))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("os:mkdir", {"path": "executed"}),
        ("os:mkdir", {"path": "executed", "num_classes": 10, "in_chans": 1}),
        ("os:system", {"command": "mkdir executed"}),
        ("builtins:exec", {"source": "import os; os.mkdir('executed')"}),
        ("subprocess:run", {"args": ["mkdir", "executed"]}),
    ],
)
def test_an_architecture_cannot_call_any_function_there_is(
    name: str, arguments: dict[str, Any]
) -> None:
    """``MODULE:FUNCTION`` is for functions that make networks, which take two numbers."""
    found = architecture()
    found.backbone = replace(found.backbone, name=name, arguments=arguments)
    read = _load(to_json(found))
    assert name in _refusal(lambda: derive(read, 0))


@pytest.mark.parametrize(
    "name, more",
    [
        ("mobilenetv2_035", {"checkpoint_path": "wicked.pth"}),
        ("mobilenetv2_035", {"pretrained": True, "pretrained_cfg": {"file": "wicked.pth"}}),
        ("mobilenetv2_035", {"pretrained": True, "pretrained_cfg_overlay": {"file": "wicked.pth"}}),
        ("local-dir:.", {"pretrained": True}),
    ],
    ids=["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "local-dir"],
)
def test_a_model_cannot_be_given_a_pickled_checkpoint(name: str, more: dict[str, Any]) -> None:
    torch.save({"state_dict": Wicked()}, "wicked.pth")
    backbone = Backbone(name, {"num_classes": 2, "in_chans": 1} | more, True, (1, 16, 16))
    assert "safetensors" in _refusal(lambda: backbone.build(0))


STATE = {"epoch": 2, "rng": torch.arange(9), "stops": [{"keep": (1,), "layer": "a"}], "lr": 0.5}
WEIGHTS = {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(7)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder with a checkpoint."""
    folder = RunFolder(tmp_path / "run")
    folder.save_checkpoint(Checkpoint(WEIGHTS, STATE), 2)
    return folder


def _is_whole(checkpoint: Checkpoint | None) -> bool:
    assert checkpoint is not None
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    same = all(torch.equal(checkpoint.weights[name], WEIGHTS[name]) for name in WEIGHTS)
    rng = checkpoint.state.pop("rng")
    rest = {name: value for name, value in STATE.items() if name != "rng"}
    return same and torch.equal(rng, torch.arange(9)) and checkpoint.state == rest


FILES = ("state.pt", "weights-0002.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "zeros"])
def test_a_damaged_checkpoint_is_refused_or_read_whole(
    run: RunFolder, file: str, damage: str
) -> None:
    """Never with other numbers: zip has its sums, and the weights their digest."""
    path, draw, refused = run / f"checkpoint/{file}", random.Random(file + damage), 0
    whole = path.read_bytes()
    for _ in range(100):
        content, place = bytearray(whole), draw.randrange(len(whole))
        if damage == "cut":
            del content[place:]
        elif damage == "flip":
            content[place] ^= 1 << draw.randrange(8)
        else:
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        path.write_bytes(content)
        try:
            assert _is_whole(run.load_checkpoint())
        except UserError:
            refused += 1
    assert refused > (75 if damage == "cut" else 10)


def _save(state: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(state, folder / "state.pt")


def _other_weights(folder: Path) -> None:
    other = RunFolder(folder / "other")
    other.save_checkpoint(Checkpoint({"w": torch.zeros(3, 4), "n": torch.tensor(7)}, STATE), 2)
    shutil.copy(other / f"checkpoint/{FILES[1]}", folder / FILES[1])


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "wicked": (_save({"epoch": Wicked()}), "damaged or was not written by a search"),
    "wicked pickle": (lambda f: (f / "state.pt").write_bytes(pickle.dumps(Wicked())), "damaged"),
    "wicked weights": (lambda f: torch.save(Wicked(), f / FILES[1]), "damaged"),
    "no state": (_save([1, 2]), "damaged"),
    "no weights named": (_save({"epoch": 1}), "damaged"),
    "weights named by a number": (_save({"weights": 3}), "damaged"),
    "newer": (_save({**STATE, "weights": "checkpoint/x", "format_version": 2}),
              "format version 2; this metapool_kernels reads 1"),
    "weights of another run": (_other_weights, "holds other weights"),
    "swapped": (lambda f: shutil.copy(f / FILES[1], f / FILES[0]), "damaged"),
    "weights gone": (lambda f: (f / FILES[1]).unlink(), "damaged"),
    "a picture": (lambda f: (f / FILES[0]).write_bytes(b"\x89PNG\r\n\x1a\n" * 40), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_checkpoint_is_refused(run: RunFolder, case: str) -> None:
    change, named = FOREIGN[case]
    change(run / "checkpoint")
    assert named in _refusal(run.load_checkpoint)


def test_a_checkpoint_from_before_digests_is_read(run: RunFolder) -> None:
    state = torch.load(run / "checkpoint/state.pt", weights_only=True)
    del state["digest"], state["format_version"]
    torch.save(state, run / "checkpoint/state.pt")
    assert _is_whole(run.load_checkpoint())


@pytest.mark.parametrize(
    "kind, seen", [(MemoryError, MemoryError), (PermissionError, UserError)], ids=str
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    run: RunFolder,
    kind: type[Exception],
    seen: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "read_bytes", _raising(kind))
    with pytest.raises(seen) as raised:
        run.load_checkpoint()
    assert "damaged" not in str(raised.value)


def test_files_are_not_called_wrong_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", evaluation())
    found = load_architecture(folder / NAME)
    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_object", _raising(MemoryError))
    with pytest.raises(MemoryError):
        load_architecture(folder / NAME)
    monkeypatch.setattr(results, "load_architecture", lambda _: found)
    with pytest.raises(MemoryError):
        load_results(RunFolder(folder))


def _raising(kind: type[Exception]) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise kind

    return fail


RESULTS = ("config.yaml", "metrics.csv", "probabilities.json", "evaluation.json", NAME)


@pytest.mark.costly
@pytest.mark.parametrize("name", RESULTS)
def test_other_files_of_a_run_are_refused_or_read(tmp_path: Path, name: str) -> None:
    """Whatever a damage makes of them, the answer is results, or a line that explains."""
    folder, draw = write_run(tmp_path / "run", evaluation()), random.Random(name)
    whole, refused = (folder / name).read_bytes(), 0
    for number in range(30):
        content, place = bytearray(whole), draw.randrange(len(whole))
        if number % 2:
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)
        try:
            load_results(RunFolder(folder))
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 3}, {"alpha": ["a"]}, {"evaluation": None}, {"more": []}, {"weight": [1.5]},
        {"weight": [True]},
    ],
    ids=str,
)  # fmt: skip
def test_a_split_of_other_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    content = {"weight": [0], "alpha": [1], "evaluation": [2], "fingerprint": "f"}
    (tmp_path / "split.json").write_text(json.dumps(content))
    assert RunFolder(tmp_path).load_split().alpha == [1]
    (tmp_path / "split.json").write_text(json.dumps(content | change))
    assert "is not a split" in _refusal(RunFolder(tmp_path).load_split)
