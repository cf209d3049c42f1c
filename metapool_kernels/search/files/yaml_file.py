"""YAML in which nothing stands twice: of two values a parser drops the first without a word."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonargparse
import yaml

MODE = "metapool"
"""``parser_mode`` of a jsonargparse parser that reads files, and values on the command line, so."""


def parse_yaml(text: str) -> Any:
    """Parse a file's content, or a value on the command line.

    Raises:
        ValueError: a name stands twice in one mapping, by itself or in front of a dot.
        yaml.YAMLError: no YAML.
    """
    for mapping in _mappings(yaml.compose(text, Loader=yaml.SafeLoader), set()):
        names = sorted((str(name.value) for name, _ in mapping.value), key=lambda n: n.split("."))
        for name, other in pairwise(names):
            if f"{other}.".startswith(f"{name}."):
                also = "" if other == name else f", the second time in {other!r}"
                raise ValueError(f"{name!r} stands there twice{also}; put both into one")
    content = jsonargparse.get_loader("yaml")(text)
    if isinstance(content, dict) and content.get("precision") is False:
        content["precision"] = "no"  # which is a truth value in YAML 1.1
    return content


def _mappings(node: Any, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Each mapping in a document once, however often and deeply it is referred to."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
    for item in node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            yield from _mappings(inner, seen)


jsonargparse.set_loader(MODE, parse_yaml, (yaml.YAMLError,))
