"""What the user reads while and after searching."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from timm.utils.metrics import AverageMeter
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from metapool_kernels.search.architecture import Architecture
from metapool_kernels.search.errors import UserError

COLLAPSE = 0.6
"""Share of the layers without pooling from which on the user is warned."""

LAYER_COLUMNS = ("layer", "map", "choice", "probability", "margin", "epoch", "reason")


class StepMeter:
    """Mean loss and accuracy, in percent, over the steps of an epoch."""

    def __init__(self) -> None:
        self.loss = AverageMeter()
        self.accuracy = AverageMeter()

    def update(self, loss: float, accuracy: float) -> None:
        """Take one step into the means."""
        self.loss.update(loss)
        self.accuracy.update(accuracy)

    def postfix(self) -> dict[str, str]:
        """The means so far, for a progress bar."""
        return {"loss": f"{self.loss.avg:.3f}", "accuracy": f"{self.accuracy.avg:.1f}%"}

    def means(self) -> dict[str, float]:
        """Both means of a finished epoch.

        Raises:
            UserError: the training has diverged.
        """
        if not math.isfinite(self.loss.avg):
            raise UserError(f"the loss became {self.loss.avg}; lower the learning rate")
        return {"loss": self.loss.avg, "accuracy": self.accuracy.avg}


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a ruled head."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def layer_rows(architecture: Architecture) -> list[tuple[str, ...]]:
    """What was chosen in each layer, how clearly, when and why, under :data:`LAYER_COLUMNS`."""
    return [
        (
            layer.name,
            "x".join(map(str, layer.map_size)),
            " + ".join(
                name if weight == 1 else f"{weight:.2f} {name}"
                for name, weight in zip(layer.choice, layer.weights, strict=True)
            ),
            f"{layer.probability:.3f}",
            f"{layer.margin:.3f}",
            str(layer.epoch),
            layer.reason,
        )
        for layer in architecture.layers
    ]


def layer_table(architecture: Architecture) -> str:
    """One line per layer: :func:`layer_rows`, aligned."""
    return format_table(LAYER_COLUMNS, layer_rows(architecture))


def choice_warnings(architecture: Architecture) -> list[str]:
    """Whether the choices have collapsed to ``skip_connect``."""
    skipping = [layer for layer in architecture.layers if layer.choice[0] == "skip_connect"]
    if len(skipping) <= COLLAPSE * len(architecture.layers):
        return []
    return [
        f"{len(skipping)} of {len(architecture.layers)} layers chose skip_connect; "
        "the search may have collapsed"
    ]


def warn(messages: Sequence[str]) -> None:
    """Print warnings on stderr, around a progress bar if there is one."""
    for message in messages:
        tqdm.write(f"metapool: warning: {message}", file=sys.stderr)


def epoch_line(row: Mapping[str, Any], note: str = "") -> str:
    """One line about one epoch."""
    return (
        f"epoch {row['epoch']:3}  loss {row['loss']:.3f}  accuracy {row['accuracy']:5.1f}%  "
        f"{row['seconds']:.1f} s  {note}"
    ).rstrip()


def log_scalars(writer: SummaryWriter, row: Mapping[str, Any]) -> None:
    """Log the numbers of one epoch to TensorBoard."""
    for name, value in row.items():
        if name != "epoch" and value is not None:
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()
