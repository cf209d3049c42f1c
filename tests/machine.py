"""The machine, as the system describes it; results of tests and figures of benchmarks name it."""

import platform
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo, where there is one."""
    source = Path("/proc/cpuinfo")
    block = source.read_text().split("\n\n")[0] if source.exists() else ""
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_name() -> str:
    """Such as ``AMD EPYC``, as the system calls it."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()
