"""Candidate names: what they stand for, round trips, and what is refused."""

import itertools
import subprocess
import sys

import pytest

from metapool_kernels import DEFAULT_CANDIDATES, pool_candidates
from metapool_kernels.candidates import (
    MAX_WINDOW,
    Candidate,
    Kind,
    parse_candidate,
    parse_candidates,
)

ODD = range(1, MAX_WINDOW + 1, 2)
ALL_NAMES = [
    "skip_connect",
    "none",
    *(f"{kind}_pool_{kh}x{kw}" for kind in ("avg", "max") for kh in ODD for kw in ODD),
]


def test_default_candidates() -> None:
    assert DEFAULT_CANDIDATES == (
        "skip_connect",
        "max_pool_3x3",
        "max_pool_5x5",
        "max_pool_7x7",
        "avg_pool_3x3",
        "avg_pool_5x5",
        "avg_pool_7x7",
    )


@pytest.mark.parametrize(
    "name, candidate",
    [
        ("none", Candidate(Kind.NONE, 1, 1)),
        ("skip_connect", Candidate(Kind.SKIP, 1, 1)),
        ("avg_pool_1x7", Candidate(Kind.AVG, 1, 7)),
        ("max_pool_15x3", Candidate(Kind.MAX, 15, 3)),
    ],
)
def test_parse(name: str, candidate: Candidate) -> None:
    assert parse_candidate(name) == candidate


def test_every_name_survives_the_round_trip() -> None:
    parsed = [parse_candidate(name) for name in ALL_NAMES]
    assert [candidate.name for candidate in parsed] == ALL_NAMES
    assert [Candidate.from_code(candidate.code) for candidate in parsed] == parsed


def test_codes_are_distinct_and_small() -> None:
    codes = [parse_candidate(name).code for name in ALL_NAMES]
    assert len(set(codes)) == len(codes)
    assert all(0 <= code < 1 << 10 for code in codes)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"sizes": (3,)}, ("skip_connect", "max_pool_3x3", "avg_pool_3x3")),
        ({"kinds": ("avg",), "skip": False, "sizes": [5, 3]}, ("avg_pool_5x5", "avg_pool_3x3")),
        ({"kinds": ()}, ("skip_connect",)),
        ({"sizes": iter((3, 15)), "kinds": ("max",), "skip": False},
         ("max_pool_3x3", "max_pool_15x15")),
    ],
)  # fmt: skip
def test_pool_candidates(arguments: dict, names: tuple[str, ...]) -> None:  # type: ignore[type-arg]
    assert pool_candidates(**arguments) == names


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sizes": (4,)}, "window of 4x4"),
        ({"sizes": (17,)}, "window of 17x17"),
        ({"kinds": ("min",)}, "unknown candidate 'min_pool_3x3'"),
        ({"sizes": (), "skip": False}, "empty"),
    ],
)
def test_pool_candidates_refuses(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        pool_candidates(**arguments)


@pytest.mark.parametrize("kind, size", [*itertools.product(("avg", "max"), (0, 2, 16, 17, -1, -3))])
def test_windows_that_are_refused(kind: str, size: int) -> None:
    for name in (f"{kind}_pool_{size}x3", f"{kind}_pool_3x{size}"):
        with pytest.raises(ValueError, match="odd and from 1 to 15") as error:
            parse_candidate(name)
        assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["", "max_pool", "max_pool_3", "max_pool_3x", "max_pool_3x3 ", "MAX_POOL_3x3", "max_pool_3X3",
     "max_pool_3.0x3", "maxpool_3x3", "sep_conv_3x3", "max_pool_3x3\n", "avg_pool_+3x3", "identity",
     "max_pool_\uff13x\uff13"],
)  # fmt: skip
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown candidate") as error:
        parse_candidate(name)
    assert repr(name) in str(error.value) and "skip_connect" in str(error.value)


@pytest.mark.parametrize("names", ["max_pool_3x3", 3, None, b"max_pool_3x3"], ids=repr)
def test_what_is_not_a_sequence_of_names(names: object) -> None:
    with pytest.raises(TypeError, match="candidates should be a sequence of str"):
        parse_candidates(names)  # type: ignore[arg-type]


@pytest.mark.parametrize("item", [3, None, ["max_pool_3x3"], {}, Kind.MAX], ids=repr)
def test_items_that_are_not_names(item: object) -> None:
    with pytest.raises(TypeError, match="got an item of"):
        parse_candidates(["max_pool_3x3", item])  # type: ignore[list-item]


def test_no_names() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        parse_candidates(())


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert parse_candidates(["none", "skip_connect"]) == parse_candidates(("none", "skip_connect"))


@pytest.mark.parametrize("names", [{"none", "skip_connect"}, iter(("none",)), {"none": 1}, None])
def test_names_have_an_order(names: object) -> None:
    """Weights belong to names by their position, which a set does not have."""
    with pytest.raises(TypeError, match="sequence of str"):
        parse_candidates(names)  # type: ignore[arg-type]


def test_candidates_need_the_standard_library_alone() -> None:
    """The module is loaded by file, so that the package around it is not imported."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('candidates', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['candidates'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    path = sys.modules["metapool_kernels.candidates"].__file__
    assert path is not None
    subprocess.run([sys.executable, "-c", code, path], check=True)
