"""What a shared library imports, shows, needs, and which instructions are where: by binutils."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOOLS = ("readelf", "objdump", "c++filt")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}
# In 64-bit code these bytes can begin nothing else.
_ENCODINGS = {"c4": "VEX", "c5": "VEX", "62": "EVEX"}


class Symbol(NamedTuple):
    """A row of the dynamic symbol table."""

    name: str
    version: str | None
    """Such as GLIBC_2.14; None where the name alone decides."""
    bind: str
    is_defined: bool


def symbols(library: Path) -> list[Symbol]:
    """What the loader binds."""
    rows = (line.split() for line in _ask("readelf", "--wide", "--dyn-syms", str(library)))
    found = []
    for row in rows:
        if len(row) > 7 and row[0][:-1].isdigit():
            name, _, version = row[7].replace("@@", "@").partition("@")
            found.append(Symbol(name, version or None, row[4], row[6] != "UND"))
    return found


def dynamic(library: Path, tag: str) -> list[str]:
    """Values of NEEDED, RPATH or another entry for the loader."""
    text = "\n".join(_ask("readelf", "--wide", "--dynamic", str(library)))
    return re.findall(rf"\({tag}\).*\[(.*)\]", text)


def stack_flags(library: Path) -> str | None:
    """``RW`` where the stack cannot be executed; None where nothing is said of it."""
    text = "\n".join(_ask("readelf", "--wide", "--program-headers", str(library)))
    match = re.search(r"GNU_STACK(?:\s+0x\w+){5}\s+(\w+)", text)
    return match[1] if match else None


def compilers(library: Path) -> list[str]:
    """Who compiled parts of it, such as ``GCC: (Debian 12.2.0-14) 12.2.0``."""
    text = "\n".join(_ask("readelf", "--string-dump=.comment", str(library)))
    return re.findall(r"\]\s+(.+)", text)


def wide_functions(library: Path) -> dict[str, set[str]]:
    """Functions with instructions of AVX and beyond: their encodings, VEX or EVEX, by name."""
    found: dict[str, set[str]] = {}
    function = "?"
    for line in _ask("objdump", "--disassemble", "--wide", str(library)):
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif encoding := _encoding(line):
            found.setdefault(function, set()).add(encoding)
    names = dict(zip(found, demangled(list(found)), strict=True))
    return {names[name]: encodings for name, encodings in found.items()}


def _encoding(line: str) -> str | None:
    """Of a line of objdump: address, bytes and mnemonic, with tabs between them."""
    cells = line.split("\t")
    if len(cells) < 3:
        return None
    first = next((byte for byte in cells[1].split() if byte not in _PREFIXES), "")
    return _ENCODINGS.get(first)


def demangled(names: list[str]) -> list[str]:
    """Names of C++, as they are written."""
    if not names:
        return []
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def _ask(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    assert process.returncode == 0, f"{' '.join(command)} failed"
