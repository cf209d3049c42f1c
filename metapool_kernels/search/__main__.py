"""``python -m metapool_kernels.search`` is ``metapool``."""

import sys

from metapool_kernels.search.cli import main

sys.exit(main())
