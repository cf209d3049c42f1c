"""setup.py as a module: how libraries are built, for tests of that and for what builds alike."""

import importlib.util
from pathlib import Path
from types import ModuleType

PATH = Path(__file__).parents[1] / "setup.py"


def load() -> ModuleType:
    """A new module each time; builds nothing."""
    spec = importlib.util.spec_from_file_location("build_script", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
