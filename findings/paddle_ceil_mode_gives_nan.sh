#!/usr/bin/env bash
# PaddlePaddle, ceil_mode=True: where the stride is larger than the window, the last window may lie
# behind the map, and is kept: nothing divided by nothing, or the smallest number of float32. Seen
# with PaddlePaddle 3.3.1 (CPU), Python 3.11:
#
#   1 2 3 4 5, window 2, stride 5: average [1.5, nan], maximum [2.0, -3.4028234663852886e+38]
#
# PyTorch drops such a window, and gives [1.5] and [2.0]. A network carried over by its numbers gets
# another shape, and one more column of NaN. Where the stride is no larger than the window, both agree.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet paddlepaddle==3.3.1 numpy==2.4.6
cat > "$work/behind.py" <<'PYTHON'
import paddle
import paddle.nn.functional as F

line = paddle.arange(1, 6).astype("float32").reshape([1, 1, 5])
average = F.avg_pool1d(line, 2, 5, ceil_mode=True).flatten().tolist()
maximum = F.max_pool1d(line, 2, 5, ceil_mode=True).flatten().tolist()
print(f"1 2 3 4 5, window 2, stride 5: average {average}, maximum {maximum}")
PYTHON
said=$("$work/venv/bin/python" -W ignore "$work/behind.py" 2> /dev/null)
echo "$said"
test "$said" = "1 2 3 4 5, window 2, stride 5: average [1.5, nan], maximum [2.0, -3.4028234663852886e+38]"
