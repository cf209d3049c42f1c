#!/usr/bin/env bash
# MNN's maximum pooling has a floor: where all numbers of a window lie below -16777216, it gives
# -16777216. Seen with MNN 3.6.1, Python 3.11, on x86-64, with precision "high":
#
#   maximum of a map of -1e6: -1e+06, -1e8: -1.67772e+07, -1e30: -1.67772e+07, -inf: -1.67772e+07
#
# A mask of -1e9 or -Inf that is pooled before a softmax comes out larger than it went in. float32 has
# numbers for another 31 powers of ten. A network whose maps stay above is not touched.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet mnn==3.6.1 numpy==2.4.6
cat > "$work/floor.py" <<'PYTHON'
import MNN.expr as expr
import numpy as np


def maximum(value):
    image = np.full((1, 4, 6, 6), value, np.float32)
    x = expr.placeholder(list(image.shape), expr.NCHW)
    x.write(image)
    x = expr.convert(x, expr.NC4HW4)
    pooled = expr.max_pool(x, [3, 3], [1, 1], expr.Padding_Mode.VALID)
    return float(np.array(expr.convert(pooled, expr.NCHW).read()).max())


values = ("-1e6", "-1e8", "-1e30", "-inf")
print("maximum of a map of " + ", ".join(f"{v}: {maximum(float(v)):g}" for v in values))
PYTHON
said=$("$work/venv/bin/python" "$work/floor.py" | grep maximum)
echo "$said"
test "$said" = "maximum of a map of -1e6: -1e+06, -1e8: -1.67772e+07, -1e30: -1.67772e+07, -inf: -1.67772e+07"
