"""Asks an installed package, from outside of any source tree, what it is and can do.

Runs as a script in the environment that is being asked, and prints JSON.
"""

import json
import platform
from pathlib import Path

import torch

import metapool_kernels
from metapool_kernels import fused_meta_pool, info


def _numpy_problem() -> str | None:
    try:
        from metapool_kernels import numpy_api

        numpy_api.active_isa()
    except (ImportError, RuntimeError) as problem:
        return str(problem)
    return None


def _is_right() -> bool:
    x, alpha = torch.randn(2, 3, 9, 8), torch.randn(7)
    chosen, plain = (fused_meta_pool(x, alpha, backend=name) for name in (None, "reference"))
    return torch.allclose(chosen, plain, atol=1e-5)


if __name__ == "__main__":
    facts = {
        "package": str(Path(metapool_kernels.__file__).parent),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "info": info.report(),
        "is_right": _is_right(),
        "numpy_problem": _numpy_problem(),
    }
    print(json.dumps(facts))
