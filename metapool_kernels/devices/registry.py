"""Targets by their names."""

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # names are asked for by command lines that need no torch.export
    from metapool_kernels.devices.target import Target

_CLASSES = {
    "onnx": "Onnx",
    "onnx_int8": "OnnxInt8",
    "executorch": "ExecuTorch",
    "executorch_int8": "ExecuTorchInt8",
    "executorch_portable": "ExecuTorchPortable",
    "litert": "LiteRT",
    "openvino": "OpenVino",
    "ncnn": "Ncnn",
    "mnn": "Mnn",
    "tract": "Tract",
}
_EXTRAS = {
    "onnx": "export",
    "onnx_int8": "export",
    "executorch_int8": "executorch",
    "executorch_portable": "executorch",
}
_ALIASES = {"onnxruntime": "onnx"}

NAMES = tuple(_CLASSES)


def target_names(names: Sequence[str]) -> list[str]:
    """The same, each once, by the names of :data:`NAMES`.

    Raises:
        ValueError: there is no such target, or none at all.
    """
    known = [_ALIASES.get(name, name) for name in names]
    for name in known:
        if name not in _CLASSES:
            raise ValueError(f"there is no target {name!r}; there are {', '.join(NAMES)}")
    if not known:
        raise ValueError(f"no target is given; there are {', '.join(NAMES)}")
    return list(dict.fromkeys(known))


def load_target(name: str) -> "Target":
    """The target of one of :data:`NAMES`; its packages need not be there."""
    (name,) = target_names([name])
    module = import_module(f"metapool_kernels.devices.targets.{name}")
    return cast("Target", getattr(module, _CLASSES[name])())


def extra(name: str) -> str:
    """The extra of this package that brings what a target needs."""
    return _EXTRAS.get(name, name)


def missing_packages(target: "Target") -> list[str]:
    """Those that it needs and that are not installed."""
    return [name for name in target.packages if not _is_there(name)]


def package_versions(target: "Target") -> dict[str, str]:
    """Of what it needs, but for packages that are installed under another name."""
    found = {}
    for package in target.packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # what it lies in is missing; it is barred
        return False
