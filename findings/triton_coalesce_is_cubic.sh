#!/usr/bin/env bash
# Triton: the time to compile a kernel grows with the cube of its loads. One pass, TritonGPUCoalesce,
# walks the whole function anew from every operation that it meets, for every load. Seen with Triton
# 3.8.0 (3.6.0 and 3.9.0 do the same), Python 3.11, for sm_90, without a GPU:
#
#   twice the loads, 7.4 times the time of TritonGPUCoalesce: 15.7 s, 98% of all passes to TritonGPU's code
#
# What comes out is 400 loads and as many additions. A kernel that is unrolled
# over rows and columns, or holds a rare second way through its work, pays for that with seconds to a
# minute at its first call, on one core. What helps: a function that is marked noinline is a graph of
# its own, and kernels can be compiled side by side, since the pass runs outside Python's lock.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet triton==3.8.0
cat > "$work/coalesce.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(x, out, LOADS: tl.constexpr):
    lane = tl.program_id(0) * 128 + tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    for i in tl.static_range(LOADS):
        total += tl.load(x + lane + i * 4099)
    tl.store(out + lane, total)


signature = {"x": "*fp32", "out": "*fp32", "LOADS": "constexpr"}
aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
source = ASTSource(kernel, signature, {(2,): int(sys.argv[1])}, aligned)
triton.compile(source, target=GPUTarget("cuda", 90, 32))
PYTHON
compile() {
  TRITON_CACHE_DIR="$work/cache-$1" MLIR_ENABLE_TIMING=1 \
    "$work/venv/bin/python" "$work/coalesce.py" "$1" > "$work/$1" 2>&1
}
compile 200
compile 400
"$work/venv/bin/python" - "$work/200" "$work/400" <<'PYTHON'
import re
import sys


def coalesce(path):
    """Seconds of the pass, and its part of the passes that it stands among."""
    for report in open(path).read().split("Execution time report")[1:]:
        if found := re.search(r"^ +(\S+) .*TritonGPUCoalesce$", report, re.M):
            whole = float(re.search(r"Total Execution Time: (\S+)", report)[1])
            return float(found[1]), float(found[1]) / whole
    sys.exit("there is no such pass")


(half, _), (whole, share) = map(coalesce, sys.argv[1:])
print(
    f"twice the loads, {whole / half:.1f} times the time of TritonGPUCoalesce: {whole:.1f} s, "
    f"{share:.0%} of all passes to TritonGPU's code"
)
sys.exit(not (whole / half > 4 and share > 0.8))
PYTHON
