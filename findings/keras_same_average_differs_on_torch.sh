#!/usr/bin/env bash
# Keras: AveragePooling with padding="same" gives other numbers on the torch backend than on the others
# where the padding is not the same on both ends, as at stride 2 on a map of even size: the last
# element is repeated and counted, instead of left out. Seen with Keras 3.15.1, torch 2.14.1, jax
# 0.10.2, Python 3.11:
#
#   1 to 6, window 3, stride 2: jax [2.0, 4.0, 5.5], torch [2.0, 4.0, 5.667]
#
# Weights that were trained on one backend make another network on the other: 5x5 averages of normal
# noise on 8x6 maps differ by up to 0.56. On maps of odd size they agree.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet keras==3.15.1 torch==2.14.1 jax==0.10.2 jaxlib==0.10.2
cat > "$work/same.py" <<'PYTHON'
import keras
import numpy as np


def average(length):
    line = np.arange(1, length + 1, dtype=np.float32).reshape(1, -1, 1)
    pool = keras.layers.AveragePooling1D(3, strides=2, padding="same")
    found = keras.ops.convert_to_numpy(pool(line)).ravel()
    return [float(str(value)) for value in found.round(3)]


assert average(5) == [1.5, 3.0, 4.5]
print(keras.backend.backend(), average(6))
PYTHON
average() { JAX_PLATFORMS=cpu KERAS_BACKEND=$1 "$work/venv/bin/python" -W ignore "$work/same.py"; }
said="1 to 6, window 3, stride 2: $(average jax), $(average torch)"
echo "$said"
test "$said" = "1 to 6, window 3, stride 2: jax [2.0, 4.0, 5.5], torch [2.0, 4.0, 5.667]"
