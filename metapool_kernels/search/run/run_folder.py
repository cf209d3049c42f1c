"""The folder of a run: files written whole or not at all, checkpoints, refusing to overwrite."""

import csv
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from metapool_kernels.search.data.splits import Split
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.json_file import parse_json
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import differences, load_config, to_yaml

CONFIG = "config.yaml"
SPLIT = "split.json"
METRICS = "metrics.csv"
TENSORBOARD = "tensorboard"
CHECKPOINT = "checkpoint"
ARCHITECTURE = "architecture.json"
WEIGHTS = "weights.safetensors"
PROBABILITIES = "probabilities.json"
ADAPT = "adapt"
SEARCHED = "searched"
EVALUATION = "evaluation.json"
EXPORT = "export"
COST = "cost.json"
ALPHA = "alpha_over_epochs.png"
HEAT_MAP = "alpha_heat_map.png"
RECEPTIVE_FIELD = "receptive_field.png"
STEP_TIME = "step_time.png"
TRAINING = "training.png"
CONTROLS = "controls.png"
COSTS = "cost_over_epochs.png"
FRONT = "front.png"
REPORT = "report.html"
CHECKPOINT_VERSION = 1

_CONTENTS = (
    CONFIG,
    SPLIT,
    METRICS,
    PROBABILITIES,
    TENSORBOARD,
    CHECKPOINT,
    ARCHITECTURE,
    WEIGHTS,
    ADAPT,
    EVALUATION,
    EXPORT,
    COST,
    ALPHA,
    HEAT_MAP,
    RECEPTIVE_FIELD,
    STEP_TIME,
    TRAINING,
    CONTROLS,
    COSTS,
    FRONT,
    REPORT,
)
_NETWORKS = (SEARCHED, "none", "skip", "random", "uniform", "fixed-*")
"""Folders of the networks in ``adapt/``, as patterns."""


def network_folder(name: str) -> str:
    """Where in ``adapt/`` a network lies: some systems have no colon in names."""
    return name.replace(":", "-", 1)


def network_in(folder: str) -> str:
    """The network that lies in a folder of :func:`network_folder`."""
    return folder.replace("fixed-", "fixed:", 1)


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: the network's tensors, and everything else in plain types."""

    weights: dict[str, Tensor]
    state: dict[str, Any]


class RunFolder:
    """A folder that one search or one training writes into."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(
        self, config: Config, sections: Sequence[str], *, resume: bool, overwrite: bool
    ) -> None:
        """Make the folder ready, or refuse before anything in it has changed.

        Args:
            config: the settings.
            sections: the fields of ``config`` that a resumed run must have been started with.
            resume: go on with the run that is there.
            overwrite: delete the run that is there; other files in the folder stay.

        Raises:
            UserError: there is a run and neither was asked for, there is none to resume or it had
                other settings, or the folder cannot be written.
        """
        if resume:
            self.check_settings(config, sections)
            return
        try:
            patterns = (*_CONTENTS, *(_NETWORKS if self.path.name == ADAPT else ()))
            present = [path.name for pattern in patterns for path in self.path.glob(pattern)]
            if present and not overwrite:
                raise UserError(
                    f"{str(self.path)!r} holds a run already ({', '.join(present)}); "
                    "go on with --resume, replace it with --overwrite, or choose another output"
                )
            if present:
                print(f"deleting from {str(self.path)!r}: {', '.join(present)}", flush=True)
            for name in present:
                _delete(self / name)
        except OSError as error:
            raise UserError(
                f"cannot use {str(self.path)!r} as output: {error.strerror or error}"
            ) from error
        self.write(CONFIG, to_yaml(config))

    def check_settings(self, config: Config, sections: Sequence[str]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Raises:
            UserError: there is no run, or some of its settings in ``sections`` were different.
        """
        if not (self / CONFIG).exists():
            raise UserError(f"there is no run in {str(self.path)!r} to go on with")
        changed = differences(load_config(self / CONFIG), config, sections)
        if changed:
            raise UserError(
                f"the run in {str(self.path)!r} was started with other settings "
                f"({'; '.join(changed)}); go on with --config {quote(str(self / CONFIG))}"
            )

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all.

        Raises:
            UserError: the folder cannot be written or the disk is full.
        """
        target = self / name
        temporary = target.with_name(f".{target.name}.tmp")
        data = content.encode() if isinstance(content, str) else content
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {str(target)!r}: {error.strerror}") from error

    def check_writable(self) -> None:
        """Notice in time that nothing can be written here.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write into {str(self.path)!r}: {reason}") from error

    def load_split(self) -> Split:
        """The split that the search has used.

        Raises:
            UserError: there is none, or not a whole one.
        """
        try:
            split = Split(**parse_json((self / SPLIT).read_text()))
            for part in (split.weight, split.alpha, split.evaluation):
                if not isinstance(part, list) or not all(type(index) is int for index in part):
                    raise ValueError("its parts should be lists of numbers")
            return split
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{str(self / SPLIT)!r} is not a split: {error}") from error

    def write_probabilities(
        self, layers: Sequence[str], trajectory: Sequence[Mapping[str, Sequence[float]]]
    ) -> None:
        """Write the open layers' probabilities, at the start and after each epoch."""
        content = {"layers": list(layers), "epochs": list(trajectory)}
        self.write(PROBABILITIES, json.dumps(content) + "\n")

    def write_metrics(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Write one line per epoch to ``metrics.csv``."""
        text = io.StringIO()
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(METRICS, text.getvalue())

    @contextmanager
    def tensorboard(self, first_epoch: int, *, active: bool) -> Iterator[SummaryWriter | None]:
        """A TensorBoard log; what an interrupted run logged from ``first_epoch`` on is hidden.

        None if not ``active``.

        Raises:
            UserError: the folder cannot be written.
        """
        if not active:
            yield None
            return
        try:
            writer = SummaryWriter(self / TENSORBOARD, purge_step=first_epoch)
        except OSError as error:
            raise UserError(f"cannot write {str(self / TENSORBOARD)!r}: {error}") from error
        with writer:
            yield writer

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors."""
        self.write(name, _tensor_bytes(weights))

    def load_weights(self) -> dict[str, Tensor]:
        """The tensors of the finished network.

        Raises:
            UserError: there are none, or the file is damaged.
        """
        try:
            return load_file(self / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"there is no finished network in {str(self.path)!r}: {error}; "
                "run 'metapool search', then 'metapool adapt', to the end"
            ) from error

    def save_checkpoint(self, checkpoint: Checkpoint, epoch: int) -> None:
        """Replace the checkpoint by that of ``epoch``.

        The state names its weights and is written after them, so a kill at any moment leaves
        one pair that belongs together; and it holds their digest, so that others are noticed.
        """
        weights = f"{CHECKPOINT}/weights-{epoch:04d}.safetensors"
        content = _tensor_bytes(checkpoint.weights)
        self.write(weights, content)
        pair = {"weights": weights, "digest": sha256(content).hexdigest()}
        state = io.BytesIO()
        torch.save({**checkpoint.state, **pair, "format_version": CHECKPOINT_VERSION}, state)
        self.write(f"{CHECKPOINT}/state.pt", state.getvalue())
        for other in (self / CHECKPOINT).glob("weights-*.safetensors"):
            if other != self / weights:
                other.unlink()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around the use of a checkpoint.

        Raises:
            UserError: it belongs to another version or another network.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"the checkpoint in {str(self.path)!r} does not fit this network or this version "
                f"of metapool_kernels: {error}; start over with --overwrite"
            ) from error

    def remove(self, *names: str) -> None:
        """Delete what no longer holds, if it is there."""
        for name in names:
            if (self / name).exists():
                _delete(self / name)

    def load_checkpoint(self) -> Checkpoint | None:
        """The checkpoint, or None where no epoch has been finished. Executes no pickled code.

        Raises:
            UserError: the files are damaged, from a newer version, or may not be read.
        """
        if not (self / f"{CHECKPOINT}/state.pt").exists():
            return None
        try:
            written = io.BytesIO((self / f"{CHECKPOINT}/state.pt").read_bytes())
            # torch.load passes over the sums that torch.save has written beside each tensor.
            with zipfile.ZipFile(written) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in state.pt is not what was written")
            written.seek(0)
            state = torch.load(written, weights_only=True)
            version = state.pop("format_version", CHECKPOINT_VERSION)
            if version == CHECKPOINT_VERSION:
                name, digest = state.pop("weights"), state.pop("digest", None)
                content = (self / name).read_bytes()
                if digest not in (None, sha256(content).hexdigest()):
                    raise ValueError(f"{name} holds other weights than it was written with")
                return Checkpoint(load(content), state)
        except pickle.UnpicklingError as error:
            # Not its text: that tells how to execute what the file holds.
            raise UserError(
                f"the checkpoint in {str(self.path)!r} is damaged or was not written by a search; "
                "start over with --overwrite"
            ) from error
        except MemoryError:
            raise  # which says nothing about the file
        except PermissionError as error:
            raise UserError(f"the checkpoint cannot be read: {error}") from error
        # A damaged file makes its reader trip over anything.
        except Exception as error:
            raise UserError(
                f"the checkpoint in {str(self.path)!r} is damaged: {error}; start over with "
                "--overwrite"
            ) from error
        raise UserError(
            f"the checkpoint in {str(self.path)!r} has format version {version}; this "
            f"metapool_kernels reads {CHECKPOINT_VERSION}: use the version that wrote it"
        )


def _tensor_bytes(weights: Mapping[str, Tensor]) -> bytes:
    # safetensors stores no strides, and channels_last weights are not contiguous to it; nor does it
    # store what several names share.
    content: bytes = save(
        {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in weights.items()
        }
    )
    return content


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
