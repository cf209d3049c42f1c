"""PyTorch's own testing modules, without what importing them does to everybody else's tests."""

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from tests import recorded


def load(name: str) -> ModuleType:
    """``torch.testing._internal.<name>``, or the module that asks for it is skipped: where what it
    needs is missing, and where a version of PyTorch that nobody has looked at has it no more.

    These modules load a profile of hypothesis with few examples, and forbid setting the flags of
    torch.backends; both are put back.
    """
    for needed in ("expecttest", "numpy"):
        pytest.importorskip(needed, reason=f"PyTorch's testing modules need {needed}")
    profile, flag = settings.default, "__allow_nonbracketed_mutation_flag"
    allowed = getattr(torch.backends, flag)
    try:
        return importlib.import_module(f"torch.testing._internal.{name}")
    except ModuleNotFoundError as error:
        if recorded.torch_is_counted():
            raise
        pytest.skip(f"torch {torch.__version__}: {error}", allow_module_level=True)
    finally:
        settings.register_profile("before PyTorch's", profile)
        settings.load_profile("before PyTorch's")
        setattr(torch.backends, flag, allowed)
