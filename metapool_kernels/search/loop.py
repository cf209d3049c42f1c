"""The search: warm up the weights, learn alpha, fix the layers one after the other."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import timm
import torch
from tqdm import tqdm

import metapool_kernels
from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import Architecture, Layer, to_json
from metapool_kernels.search.backbone import make_backbone
from metapool_kernels.search.bilevel import alpha_step, weight_step
from metapool_kernels.search.config import Config, SearchConfig
from metapool_kernels.search.data import (
    Batch,
    Data,
    Split,
    load_data,
    split_data,
    split_warnings,
    steps_per_epoch,
    training_batches,
)
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.optimizers import (
    forget,
    make_alpha_optimizer,
    make_weight_optimizer,
)
from metapool_kernels.search.plots import alpha_figure, png
from metapool_kernels.search.report import (
    StepMeter,
    choice_warnings,
    epoch_line,
    layer_table,
    log_scalars,
    warn,
)
from metapool_kernels.search.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.stopping import ProgressiveStopping, Stop
from metapool_kernels.search.supernet import Supernet

SETTINGS = ("seed", "threads", "data", "model", "search")
"""The fields of the configuration that a search depends on."""


def run_search(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Search, from the start or from the last finished epoch, and write the run folder.

    Raises:
        UserError: something in the configuration, the data or the folder does not work; nothing
            has been overwritten then.
    """
    warmup, deadline = phases(config.search)
    data = load_data(config.data, config.seed)
    split = split_data(data, config.search.alpha_half, config.seed)
    steps = steps_per_epoch(split.weight, config.data)
    search = Search(config, data, steps, warmup=warmup, deadline=deadline)
    run = RunFolder(config.output)
    run.begin(config, SETTINGS, resume=resume, overwrite=overwrite)
    if (run / run_folder.SPLIT).exists():
        split = run.load_split()
    else:
        run.write(run_folder.SPLIT, json.dumps(asdict(split)) + "\n")
    warn(split_warnings(data, split))

    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        search.restore(checkpoint)
    search.train(run, split)
    architecture = search.architecture()
    run.write_weights(run_folder.WEIGHTS, search.supernet.model.state_dict())
    run.write(run_folder.PLOT, png(alpha_figure(architecture, search.trajectory)))
    run.write(run_folder.ARCHITECTURE, to_json(architecture))
    print(layer_table(architecture))
    warn(choice_warnings(architecture))


def phases(config: SearchConfig) -> tuple[int, int]:
    """Epochs of the warm-up, and the epoch (from 1) at whose end no layer stays open.

    Raises:
        UserError: no epoch is left between the two.
    """
    warmup = round(config.warmup * config.epochs)
    deadline = round(config.stop.deadline * config.epochs)
    if warmup >= deadline:
        raise UserError(
            f"alpha is never trained: of search.epochs {config.epochs}, search.warmup takes "
            f"{warmup} and search.stop.deadline comes after {deadline}"
        )
    return warmup, deadline


class Search:
    """Everything that changes while searching. ``epoch`` counts the finished ones."""

    def __init__(
        self, config: Config, data: Data, steps: int, *, warmup: int, deadline: int
    ) -> None:
        """Build the supernet; ``steps`` per epoch, ``warmup`` and ``deadline`` in epochs."""
        self.config = config
        self.data = data
        self.steps = steps
        self.warmup = warmup
        self.backbone = make_backbone(config.model, data.image_shape, len(data.classes))
        self.supernet = Supernet(self.backbone, config.model, config.seed)
        self.layers = [site.name for site in self.supernet.sites]
        rule = config.search.stop
        self.stopping = ProgressiveStopping(
            self.layers,
            delta=rule.delta,
            patience=rule.patience,
            ema=rule.ema,
            deadline=deadline,
        )
        self.weights = self.supernet.weights()
        self.weight_optimizer, self.schedule = make_weight_optimizer(
            self.weights, config.search.weights, config.search.epochs * steps
        )
        self.alpha_optimizer = make_alpha_optimizer(
            self.supernet.alphas(self.layers), config.search.alpha
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.trajectory = [self.supernet.probabilities(self.layers)]
        self.stopped_alphas: dict[str, list[float]] = {}

    def train(self, run: RunFolder, split: Split) -> None:
        """Search until every layer has stopped, saving after each epoch.

        The epochs that are left then would train weights alone, and on half of the images;
        adapting does that better, so they are not spent.
        """
        bar = tqdm(
            total=self.stopping.deadline * self.steps,
            initial=self.epoch * self.steps,
            desc="search",
            disable=None,
        )
        with run.tensorboard(self.epoch + 1) as writer, bar:
            while self.stopping.open_layers:
                row = self._train_epoch(split, bar)
                self.trajectory.append(self.supernet.probabilities(self.stopping.open_layers))
                for stop in self.stopping.check(self.epoch):
                    self._discretise(stop)
                row["stopped"] = len(self.stopping.stops)
                self.history.append(row)
                run.save_checkpoint(self._checkpoint(), self.epoch)
                run.write_metrics(self.history)
                log_scalars(writer, row)
                tqdm.write(epoch_line(row, f"stopped {self._count_stopped()}"))

    def _train_epoch(self, split: Split, bar: "tqdm[NoReturn]") -> dict[str, Any]:
        started = time.perf_counter()
        first_step = self.epoch * self.steps
        batches = self._batches(split.weight, first_step)
        alpha_batches = self._batches(split.alpha, (self.epoch - self.warmup) * self.steps)
        alphas = self.supernet.alphas(self.stopping.open_layers)
        meter, alpha_meter = StepMeter(), StepMeter()
        model = self.supernet.model.train()
        for step in range(first_step, first_step + self.steps):
            if self.epoch >= self.warmup:
                alpha_meter.update(
                    *alpha_step(model, alphas, next(alpha_batches), self.alpha_optimizer)
                )
                self.stopping.update(self.supernet.probabilities(self.stopping.open_layers))
            self.schedule.step_update(step)
            clip = self.config.search.weights.clip
            meter.update(
                *weight_step(model, self.weights, next(batches), self.weight_optimizer, clip)
            )
            bar.update()
            bar.set_postfix(**meter.postfix(), stopped=self._count_stopped())
        alpha_means = alpha_meter.means() if self.epoch >= self.warmup else {}
        self.epoch += 1
        return {
            "epoch": self.epoch,
            **meter.means(),
            "alpha_loss": alpha_means.get("loss"),
            "alpha_accuracy": alpha_means.get("accuracy"),
            "lr": self.weight_optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _batches(self, images: Sequence[int], first_step: int) -> Iterator[Batch]:
        config = self.config
        return training_batches(
            self.data.train_set, images, config.data, config.seed, max(0, first_step)
        )

    def _count_stopped(self) -> str:
        return f"{len(self.stopping.stops)}/{len(self.layers)}"

    def _discretise(self, stop: Stop) -> None:
        alpha = self.supernet.alpha(stop.layer)
        forget(self.alpha_optimizer, alpha)
        self.stopped_alphas[stop.layer] = alpha.detach().tolist()
        self.supernet.discretise(stop.layer, stop.keep)

    def _checkpoint(self) -> Checkpoint:
        state = {
            "epoch": self.epoch,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "stopping": self.stopping.state_dict(),
            "stopped_alphas": self.stopped_alphas,
            "history": self.history,
            "trajectory": self.trajectory,
            "rng": torch.get_rng_state(),
        }
        return Checkpoint(self.supernet.model.state_dict(), state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if there had been no break."""
        state = checkpoint.state
        self.stopping.load_state_dict(state["stopping"])
        for stop in self.stopping.stops.values():
            self._discretise(stop)
        self.supernet.model.load_state_dict(checkpoint.weights)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.epoch = state["epoch"]
        self.history = state["history"]
        self.trajectory = state["trajectory"]
        self.stopped_alphas = state["stopped_alphas"]
        # Last: rebuilding the stopped layers has drawn from the generator.
        torch.set_rng_state(state["rng"])

    def architecture(self) -> Architecture:
        """What has been found; every layer must have stopped."""
        layers = []
        for site in self.supernet.sites:
            stop = self.stopping.stops[site.name]
            layers.append(
                Layer(
                    name=site.name,
                    channels=site.channels,
                    map_size=site.map_size,
                    choice=[self.config.model.candidates[k] for k in stop.keep],
                    weights=self.supernet.probabilities([site.name])[site.name],
                    alpha=self.stopped_alphas[site.name],
                    probability=stop.probability,
                    margin=stop.margin,
                    epoch=stop.epoch,
                    reason=stop.reason,
                )
            )
        return Architecture(
            backbone=self.backbone,
            insert_after=self.config.model.insert_after,
            candidates=self.config.model.candidates,
            count_include_pad=self.config.model.count_include_pad,
            layers=layers,
            seed=self.config.seed,
            versions={
                "metapool_kernels": metapool_kernels.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
            },
        )
