"""The settings read, from files and the command line, written and compared."""

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.yaml_file import MODE
from metapool_kernels.search.settings.config import Config


def config_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """A parser of all settings; ``options`` are those of ``jsonargparse.ArgumentParser``."""
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False, allow_abbrev=False, parser_mode=MODE, **options
    )
    parser.add_class_arguments(Config)
    return parser


def check_sections(settings: jsonargparse.Namespace) -> None:
    """Refuse sections without settings, of which jsonargparse makes ``None``.

    Raises:
        ValueError: there is one.
    """
    for name in _sections(Config):
        if settings.get(name) is None:
            raise ValueError(f"section {name!r} is empty; put settings into it or take it out")


def to_config(settings: jsonargparse.Namespace) -> Config:
    """What a parser has instantiated, as one object of plain numbers."""
    return Config(**{item.name: _plain(settings[item.name]) for item in fields(Config)})


def _sections(kind: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings that hold others, the outer ones first."""
    for item in fields(kind):
        if is_dataclass(item.type):
            yield f"{prefix}{item.name}"
            yield from _sections(item.type, f"{prefix}{item.name}.")


def _plain(value: Any) -> Any:
    """``value`` without jsonargparse's own types, which checkpoints could not hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    for kind in (float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def to_yaml(config: Config) -> str:
    """All settings as YAML."""
    parser = config_parser()
    text: str = parser.dump(parser.parse_object(asdict(config)))
    return text


def load_config(path: Path) -> Config:
    """Read what :func:`to_yaml` has written.

    Raises:
        UserError: the file is not there or is no such file.
    """
    parser = config_parser()
    try:
        settings = parser.parse_path(str(path))
        check_sections(settings)
        return to_config(parser.instantiate(settings))
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{str(path)!r} holds no settings of metapool search: {error}") from error


_CHANGE_NO_NUMBER = ("data.root", "data.download", "data.workers")
"""What a run may go on with otherwise: the images themselves are compared, see splits.py."""


def differences(old: Config, new: Config, sections: Sequence[str]) -> list[str]:
    """What has changed between two configurations in some of their fields, in words.

    A section is a field (``data.kind``) or all that is below it (``data``). What can change no
    number is left out.
    """
    before, after = (dict(_leaves(asdict(config), "")) for config in (old, new))
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before | after)
        if any(f"{name}.".startswith(f"{section}.") for section in sections)
        and name not in _CHANGE_NO_NUMBER
        and before.get(name) != after.get(name)
        and not (name in _FILES and _same_file(before.get(name), after.get(name)))
    ]


_FILES = ("model.weights", "search.cost.file")


def _same_file(one: str | None, other: str | None) -> bool:
    try:
        return one is not None and other is not None and filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
