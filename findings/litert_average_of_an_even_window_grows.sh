#!/usr/bin/env bash
# litert-torch: an average that does not count its padding, of a window that is even along the axis
# without padding and odd along the padded one, is converted to padding "SAME", which pads the other
# axis too: the output has a column more than PyTorch's, and each column is of other elements. Nothing
# is said. With padding counted, as a maximum, or with an odd window, the shape is PyTorch's. Seen with
# litert-torch 0.10.0, ai-edge-litert 2.3.0, torch 2.13.0, Python 3.11, x 1 x 4 x 9 x 13:
#
#   AvgPool2d((3, 2), 1, (1, 0), count_include_pad=False): torch 9x12, LiteRT 9x13
#   AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False): torch 5x6, LiteRT 5x7
#   AvgPool2d((3, 2), 2, (1, 0)): torch 5x6, LiteRT 5x6
#   AvgPool2d((3, 3), 2, (1, 1), count_include_pad=False): torch 5x7, LiteRT 5x7
#
# What follows in the network then fails when the file is loaded, or, behind a mean over the map,
# computes something else.
#
# What helps: compare the file's outputs with PyTorch's; write the average as one along each axis.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 litert-torch==0.10.0 \
  ai-edge-litert==2.3.0
cat > "$work/convert.py" <<'PYTHON'
import sys

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

POOLINGS = {
    "AvgPool2d((3, 2), 1, (1, 0), count_include_pad=False)": ((3, 2), 1, (1, 0), False, False),
    "AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False)": ((3, 2), 2, (1, 0), False, False),
    "AvgPool2d((3, 2), 2, (1, 0))": ((3, 2), 2, (1, 0)),
    "AvgPool2d((3, 3), 2, (1, 1), count_include_pad=False)": ((3, 3), 2, (1, 1), False, False),
}
x = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(0))
for name, arguments in POOLINGS.items():
    pooling = nn.AvgPool2d(*arguments).eval()
    litert_torch.convert(pooling, (x,)).export(sys.argv[1])
    interpreter = Interpreter(sys.argv[1])
    interpreter.allocate_tensors()
    (found,) = interpreter.get_output_details()
    sizes = ["x".join(map(str, shape[2:])) for shape in (pooling(x).shape, found["shape"])]
    print(f"FOUND {name}: torch {sizes[0]}, LiteRT {sizes[1]}")
PYTHON
said=$("$work/venv/bin/python" "$work/convert.py" "$work/pool.tflite" 2> /dev/null | grep FOUND | cut -c7-)
echo "$said"
test "$said" = "AvgPool2d((3, 2), 1, (1, 0), count_include_pad=False): torch 9x12, LiteRT 9x13
AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False): torch 5x6, LiteRT 5x7
AvgPool2d((3, 2), 2, (1, 0)): torch 5x6, LiteRT 5x6
AvgPool2d((3, 3), 2, (1, 1), count_include_pad=False): torch 5x7, LiteRT 5x7"
