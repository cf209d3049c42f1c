"""``python -m tests.frameworks NAME``: what a framework that is installed does.

Prints its rows for ``metapool_kernels/devices/frameworks.md``; ends with 1 if the page has others.
NAME is a file of this folder. It wants NumPy and the framework, and nothing of this package.
"""

import sys
from importlib import import_module

from tests.frameworks.rows import COLUMNS, print_and_compare, row

if __name__ == "__main__":
    frameworks = import_module(f"tests.frameworks.{sys.argv[1]}").frameworks()
    sys.exit(min(1, print_and_compare(COLUMNS, [row(framework) for framework in frameworks])))
