#!/usr/bin/env bash
# timm's ModelEmaV3 averages a parameter of one number into one of seven without a word: after a
# parameter of the network has shrunk, its average keeps the old shape and takes the one number into
# all of its places. Seen with timm 1.0.31, torch 2.14.1, Python 3.11, with foreach and without:
#
#   average of [0..6] and then [100]: [50.0, 50.5, 51.0, 51.5, 52.0, 52.5, 53.0]
#
# Layers that lose candidates, channels or heads while they are trained shrink so. An average has to
# be made anew behind each such change; load_state_dict of the averaged weights fails only then.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$work/averaged.py" <<'PYTHON'
import torch
from timm.utils import ModelEmaV3


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.arange(7.0))


def average(foreach):
    layer = Layer()
    ema = ModelEmaV3(layer, decay=0.5, foreach=foreach)
    layer.alpha = torch.nn.Parameter(torch.tensor([100.0]))  # all candidates but one are gone
    ema.update(layer)
    return ema.module.alpha.tolist()


assert average(True) == average(False)
print(f"average of [0..6] and then [100]: {average(True)}")
PYTHON
said=$("$work/venv/bin/python" -W ignore "$work/averaged.py")
echo "$said"
test "$said" = "average of [0..6] and then [100]: [50.0, 50.5, 51.0, 51.5, 52.0, 52.5, 53.0]"
