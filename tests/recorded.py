"""Figures that belong to one version of a program of somebody else.

What a compiler makes of a kernel, or how many samples PyTorch tries its pooling on, is asserted
under the versions for which somebody has looked, and skipped under others: nobody knows what is
right there.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

Figures = dict[str, float]

SLACK = 1.1
"""Figures may be so much worse than when they were recorded: a patch release may change them."""

TORCH = ("2.10", "2.11", "2.13", "2.14", "2.15")
"""Versions whose samples of the two poolings, errors and dtypes have been counted."""


def minor(version: str) -> str:
    """``3.8`` of ``3.8.1`` or of ``3.8.1+git12``."""
    match = re.match(r"\d+\.\d+", version)
    assert match, version
    return match[0]


def torch_is_counted() -> bool:
    """Whether the running torch is one of TORCH."""
    return minor(torch.__version__) in TORCH


def require_counted_torch() -> None:
    """The test ends here under a version that has other samples."""
    if not torch_is_counted():
        pytest.skip(f"counted under torch {' and '.join(TORCH)}, and this is {torch.__version__}")


@dataclass(frozen=True)
class Ratchet:
    """Figures as they were when they were last improved, under each version of a compiler and for
    each architecture.

    ``METAPOOL_WRITE_RATCHET=1`` writes those of the running version anew.
    """

    path: Path
    compiler: str
    version: str
    """The running one, major and minor."""
    capability: int
    """Such as 90, for sm_90."""

    @property
    def writes(self) -> bool:
        """Whether figures are recorded and not compared."""
        return os.environ.get("METAPOOL_WRITE_RATCHET") == "1"

    @property
    def under(self) -> str:
        """The name of the table."""
        return f"{self.version} for sm_{self.capability}"

    def tables(self) -> dict[str, dict[str, Figures]]:
        """Of each version and architecture, the figures of each kernel."""
        found: dict[str, dict[str, Figures]] = json.loads(self.path.read_text())
        return found

    def table(self) -> dict[str, Figures]:
        """That of the running version, or the test ends here."""
        tables = self.tables()
        if self.under not in tables:
            pytest.skip(
                f"no figures were recorded under {self.compiler} {self.under}, but under "
                f"{', '.join(tables)}; METAPOOL_WRITE_RATCHET=1 records them"
            )
        return tables[self.under]

    def kept(self, kernel: str) -> Figures:
        """The figures of a kernel under the running version, or the test ends here."""
        table = self.table()
        assert kernel in table, (
            f"{self.path.name} has no {kernel!r} under {self.compiler} {self.under}; "
            "METAPOOL_WRITE_RATCHET=1 records it"
        )
        return table[kernel]

    def record(self, kernel: str, found: Mapping[str, float]) -> None:
        """Replace the figures of a kernel under the running version."""
        tables = self.tables()
        tables.setdefault(self.under, {})[kernel] = dict(found)
        self.path.write_text(as_text(tables))


def as_text(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """JSON with a line for each kernel, so that a change shows what it changes."""
    parts = []
    for version, table in sorted(tables.items(), key=lambda pair: _numbers(pair[0])):
        lines = [
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(figures)}"
            for name, figures in table.items()
        ]
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _numbers(under: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", under)))


def assert_no_worse(found: Mapping[str, float], kept: Mapping[str, float], *names: str) -> None:
    """None of these figures, of which less is better, has grown."""
    for name in names:
        assert found[name] <= SLACK * kept[name], f"more {name} than when this was last improved"
