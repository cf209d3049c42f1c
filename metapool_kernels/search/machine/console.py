"""What the user reads while a command runs: progress, tables, warnings."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from metapool_kernels.search.errors import UserError

if TYPE_CHECKING:  # they are a second to import, and who takes only a step needs neither
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter


class StepMeter:
    """Mean loss and accuracy, in percent, over the steps of an epoch and over all processes.

    Sums stay on the device: reading a number there at every step would make the GPU wait.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.sum = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        self.steps = 0

    def update(self, loss: Tensor, accuracy: Tensor) -> None:
        """Take one step into the means."""
        self.sum += torch.stack([loss, accuracy])
        self.steps += 1

    def postfix(self) -> dict[str, str]:
        """The means so far, in this process, for a progress bar."""
        if not self.steps:
            return {}
        loss, accuracy = (self.sum / self.steps).tolist()
        return {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1f}%"}

    def means(self) -> dict[str, float | None]:
        """Both means of a finished epoch, None without any step.

        Raises:
            UserError: the training has diverged.
        """
        if not self.steps:
            return {"loss": None, "accuracy": None}
        mean = self.accelerator.reduce(self.sum / self.steps, reduction="mean")
        loss, accuracy = mean.tolist()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss}; lower the learning rate")
        return {"loss": loss, "accuracy": accuracy}


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a ruled head."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def warn(messages: Sequence[str]) -> None:
    """Print warnings on stderr, around a progress bar if there is one."""
    for message in messages:
        tqdm.write(f"metapool: warning: {message}", file=sys.stderr)


def epoch_line(row: Mapping[str, Any], note: str = "") -> str:
    """One line about one epoch; where only alpha is trained, about alpha's half."""
    half = "" if row["loss"] is not None else "alpha_"
    return (
        f"epoch {row['epoch']:3}  loss {row[half + 'loss']:.3f}  "
        f"accuracy {row[half + 'accuracy']:5.1f}%  {row['seconds']:.1f} s  {note}"
    ).rstrip()


def log_scalars(writer: "SummaryWriter | None", row: Mapping[str, Any]) -> None:
    """Log the numbers of one epoch to TensorBoard, in the process that has one."""
    if writer is None:
        return
    for name, value in row.items():
        if name != "epoch" and value is not None:
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()
