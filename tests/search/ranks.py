"""``metapool`` in one of several processes, which then tells what it has come to.

``torchrun --nproc-per-node 2 -m tests.search.ranks FOLDER search ...`` leaves ``rank0.json`` and
``rank1.json`` in FOLDER.
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from metapool_kernels.search.cli import main
from metapool_kernels.search.method.stopping import ProgressiveStopping, Stop
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.training.loop import Search

train = Search.train
dtypes: set[str] = set()


def note_dtype(module: nn.Module, inputs: object, output: object) -> None:
    """Of what is trained, not of what is only tried."""
    if isinstance(module, nn.Conv2d) and module.training and isinstance(output, Tensor):
        dtypes.add(str(output.dtype))


def telling_train(self: Search, run: RunFolder) -> None:
    train(self, run)
    parameters = self.upper.supernet.model.named_parameters()
    told = {
        "processes": self.accelerator.num_processes,
        "stops": self.upper.stopping.state_dict()["stops"],
        "alphas": self.upper.stopped_alphas,
        "choices": {layer: self.upper.supernet.choice(layer) for layer in self.layers},
        "weights": {
            name: sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in parameters
        },
        "losses": [row["loss"] for row in self.upper.history],
        "steps": self.steps,
        "dtypes": sorted(dtypes),
    }
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))


def never(self: ProgressiveStopping, epoch: int, importances: object) -> list[Stop]:
    raise AssertionError("only the main process decides which layers stop")


if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    if os.environ["RANK"] != "0":
        ProgressiveStopping.check = never  # type: ignore[method-assign]
    register_module_forward_hook(note_dtype)
    Search.train = telling_train  # type: ignore[method-assign]
    sys.exit(main(arguments))
