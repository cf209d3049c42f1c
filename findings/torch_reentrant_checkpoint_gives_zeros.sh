#!/usr/bin/env bash
# torch.utils.checkpoint with use_reentrant=True does not work under torch.autograd.grad, and says so,
# though as if the weights inside had not been used. With materialize_grads=True or allow_unused=True
# it says nothing: the gradient of what is recomputed is zero or None. Seen with torch 2.13.0 (CPU
# build), Python 3.11:
#
#   plain: RuntimeError; materialize_grads: 0; allow_unused: None; without reentry: 2.7
#
# Whoever takes gradients by torch.autograd.grad, as every hypergradient does, and fills in zeros for
# what is not used, trains nothing in such a part. It shows in a comparison with backward() alone.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/checkpointed.py" <<'PYTHON'
import torch
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
inner, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
x = torch.randn(2, 3, requires_grad=True)


def gradient(reentrant, **options):
    loss = head(checkpoint(inner, x, use_reentrant=reentrant)).sum()
    try:
        grad, _ = torch.autograd.grad(loss, [inner.weight, head.weight], **options)
    except RuntimeError:
        return "RuntimeError"
    return "None" if grad is None else f"{grad.abs().sum().item():.3g}"


print(
    f"plain: {gradient(True)}; materialize_grads: {gradient(True, materialize_grads=True)}; "
    f"allow_unused: {gradient(True, allow_unused=True)}; without reentry: {gradient(False)}"
)
PYTHON
said=$("$work/venv/bin/python" -W ignore "$work/checkpointed.py")
echo "$said"
test "$said" = "plain: RuntimeError; materialize_grads: 0; allow_unused: None; without reentry: 2.7"
