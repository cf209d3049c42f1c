"""JSON as this package writes it: anything else that a parser would let through is refused."""

import json
from collections import Counter
from typing import Any


def parse_json(text: str, *, finite: bool = False) -> Any:
    """Parse a file's content.

    Args:
        text: the content.
        finite: whether NaN and infinities, which are no JSON but written by Python, are refused.

    Raises:
        ValueError: no JSON, a name that stands twice in one object, or lists nested too deeply.
    """
    options: dict[str, Any] = {"parse_constant": _refuse} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_unique, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
