"""JSON as this package writes it: anything else that a parser would let through is refused."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import jsonargparse

from metapool_kernels.search.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Format(Generic[T]):
    """A file that holds one object, under a name and a version of its format.

    Attributes:
        kind: the object's dataclass.
        name: of the format, as it stands in the file.
        version: that this package writes and reads.
        what: a file of this format, in words.
        origin: what the user does to get one.
        check: raises an error about an object that cannot be.
    """

    kind: type[T]
    name: str
    version: int
    what: str
    origin: str
    check: Callable[[T], None]

    def to_json(self, content: T) -> str:
        """The file's content."""
        head = {"format": self.name, "format_version": self.version}
        return json.dumps({**head, **asdict(cast(Any, content))}, indent=2) + "\n"

    def load(self, path: Path) -> T:
        """Read a file.

        Raises:
            UserError: there is none, it is cut off, not such a file, from a newer version, or holds
                something that cannot be.
        """
        try:
            content = parse_json(path.read_text(), finite=True)
        except FileNotFoundError as error:
            raise UserError(f"there is no {str(path)!r}; {self.origin}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{str(path)!r} is not a complete JSON file: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != self.name:
            raise UserError(f"{str(path)!r} is not {self.what}")
        version = content.pop("format_version", None)
        if type(version) is not int or version != self.version:
            raise UserError(
                f"{str(path)!r} has format version {version}; this metapool_kernels reads "
                f"{self.version}: use the version that wrote it"
            )
        return to_object(path, self.kind, content, self.check)


def to_object(
    path: Path, kind: type[T], content: Any, check: Callable[[T], None] | None = None
) -> T:
    """What a file holds as a dataclass, each field of its type.

    Raises:
        UserError: a field is missing, unknown or of another type, or ``check`` raises.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--content", type=kind, required=True)
    try:
        found: T = parser.instantiate(parser.parse_object({"content": content})).content
        if check is not None:
            check(found)
    except MemoryError:
        raise  # which says nothing about the file
    # The parser meets whatever stands in the file, and not all that it trips over is its own error.
    except Exception as error:
        raise UserError(f"{str(path)!r} is not valid: {error}") from error
    return found


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
