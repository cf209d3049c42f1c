"""Candidate names and the pooling windows they stand for.

The names follow the convention of differentiable architecture search (DARTS):
``skip_connect``, ``none``, ``max_pool_3x3``, ``avg_pool_1x7``. This module is the only
place that turns a name into a window; it needs nothing but the standard library.
"""

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

MAX_WINDOW = 15

_POOL_NAME = re.compile(r"(avg|max)_pool_(0|-?[1-9][0-9]*)x(0|-?[1-9][0-9]*)")
_ALLOWED = (
    "'skip_connect', 'none', 'avg_pool_{kh}x{kw}' or 'max_pool_{kh}x{kw}' "
    f"with kh and kw odd and from 1 to {MAX_WINDOW}"
)


class Kind(IntEnum):
    """What a candidate computes. The values are shared with ``csrc/window.h``."""

    NONE = 0
    SKIP = 1
    AVG = 2
    MAX = 3


class Candidate(NamedTuple):
    """One candidate pooling: its kind and its window, height by width, in pixels."""

    kind: Kind
    kh: int
    kw: int

    @property
    def name(self) -> str:
        """The name that :func:`parse_candidate` turns back into this candidate."""
        if self.kind is Kind.NONE:
            return "none"
        if self.kind is Kind.SKIP:
            return "skip_connect"
        return f"{self.kind.name.lower()}_pool_{self.kh}x{self.kw}"

    @property
    def code(self) -> int:
        """The candidate as one integer, as the registered ops and ``csrc`` take it."""
        return self.kind << 8 | self.kh << 4 | self.kw

    @classmethod
    def from_code(cls, code: int) -> "Candidate":
        """Inverse of :attr:`code`."""
        return cls(Kind(code >> 8), code >> 4 & 15, code & 15)


def parse_candidate(name: str) -> Candidate:
    """Turn one candidate name into its kind and window.

    Raises:
        ValueError: the name is unknown, or its window is even, zero, negative or too large.
    """
    if name == "none":
        return Candidate(Kind.NONE, 1, 1)
    if name == "skip_connect":
        return Candidate(Kind.SKIP, 1, 1)
    match = _POOL_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown candidate {name!r}; allowed: {_ALLOWED}")
    kh, kw = int(match[2]), int(match[3])
    if not all(1 <= size <= MAX_WINDOW and size % 2 == 1 for size in (kh, kw)):
        raise ValueError(f"candidate {name!r} has a window of {kh}x{kw}; allowed: {_ALLOWED}")
    return Candidate(Kind[match[1].upper()], kh, kw)


def candidate_names(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` as a tuple of strings that have not been looked at yet.

    Raises:
        TypeError: ``names`` is one string, no sequence, or holds something else than strings.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"candidates should be a sequence of str such as ('skip_connect', 'max_pool_3x3'), "
            f"got {names!r} of {type(names)!r}"
        )
    names = tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"candidates should be a sequence of str, got an item of {type(name)!r}"
            )
    return names


def parse_candidates(names: Sequence[str]) -> tuple[Candidate, ...]:
    """Turn a sequence of candidate names into candidates, in the same order.

    Raises:
        TypeError: as for :func:`candidate_names`.
        ValueError: there is no name, or one of them is not allowed.
    """
    names = candidate_names(names)
    if not names:
        raise ValueError("candidates is empty; give at least one name")
    return tuple(parse_candidate(name) for name in names)


def normalized_positions(candidates: Sequence[Candidate]) -> list[int]:
    """Positions of the candidates that are normalised: all but ``skip_connect`` and ``none``."""
    return [k for k, one in enumerate(candidates) if one.kind not in (Kind.SKIP, Kind.NONE)]


def pool_candidates(
    sizes: Iterable[int] = (3, 5, 7),
    kinds: Iterable[str] = ("max", "avg"),
    skip: bool = True,
) -> tuple[str, ...]:
    """Build a tuple of candidate names with square windows.

    Args:
        sizes: window sides in pixels, odd, 1 to 15. Default: 3, 5, 7.
        kinds: ``"max"``, ``"avg"`` or both. Default: both.
        skip: whether ``"skip_connect"`` comes first. Default: True.

    Returns:
        The names, grouped by kind: with the defaults, :data:`DEFAULT_CANDIDATES`.

    Raises:
        ValueError: a size or a kind is not allowed, or nothing is left to choose from.
    """
    sizes = tuple(sizes)
    names = [f"{kind}_pool_{size}x{size}" for kind in kinds for size in sizes]
    if skip:
        names.insert(0, "skip_connect")
    parse_candidates(names)
    return tuple(names)


DEFAULT_CANDIDATES: tuple[str, ...] = pool_candidates()
