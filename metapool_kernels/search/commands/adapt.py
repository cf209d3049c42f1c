"""``metapool adapt``: train the network that was found, and its controls, at the same budget."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from metapool_kernels.search.commands.plot import draw
from metapool_kernels.search.data.inspection import load_inspected
from metapool_kernels.search.data.splits import image_settings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.collective import on_main
from metapool_kernels.search.machine.console import epoch_line
from metapool_kernels.search.machine.jobs import side_by_side
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.backbone import TEACHER
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.controls import build_network, network_names
from metapool_kernels.search.run.run_folder import SEARCHED, RunFolder, network_folder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.inherited import inherited_network
from metapool_kernels.search.training.optimizers import make_weight_optimizer
from metapool_kernels.search.training.plain_training import Training

SETTINGS = ("seed", "threads", "precision", "data", "model.weights", "adapt")
"""The fields of the configuration that the training depends on."""


def run_adapt(config: Config, *, resume: bool, overwrite: bool, jobs: int = 1) -> None:
    """Train all networks, with each seed, in the same order of images.

    Args:
        config: the settings.
        resume: go on where an earlier run was broken off.
        overwrite: delete what an earlier run has left.
        jobs: networks that are trained at a time, each in a process of its own.

    Raises:
        UserError: there is no finished search, it was made on other data, or the networks have
            been trained already and neither ``resume`` nor ``overwrite`` was asked for.
    """
    accelerator = make_accelerator(config)
    if jobs > 1 and accelerator.num_processes > 1:
        raise UserError("--jobs is for one process; several, as of torchrun, train together")
    trainer = Trainer(config)
    run, searched = trainer.run, trainer.searched
    # An optimizer that cannot be made, or not used, is named before anything is deleted.
    make_weight_optimizer([torch.zeros(1)], config.adapt.weights, steps=1)

    def begin() -> None:
        run.begin(config, SETTINGS, resume=resume, overwrite=overwrite)
        # They show networks that are gone, or will be before long.
        searched.remove(run_folder.EVALUATION, run_folder.CONTROLS, run_folder.EXPORT)

    on_main(begin)
    networks = [
        (name, seed)
        for seed in range(config.seed, config.seed + config.adapt.seeds)
        for name in network_names(config.adapt.controls)
    ]
    waiting = [network for network in networks if not trainer.is_trained(*network)]
    if jobs == 1:
        for network in waiting:
            trainer.train(*network)
    else:
        side_by_side(partial(_train_quietly, config), waiting, jobs)
    left = [f"{name}, seed {seed}" for name, seed in waiting if not trainer.is_trained(name, seed)]
    if left:
        raise UserError(f"not trained to the end: {'; '.join(left)}; go on with --resume")
    on_main(lambda: draw(searched))


def _train_quietly(config: Config) -> Callable[[tuple[str, int]], None]:
    """What trains one network after the other, in a process beside the main one."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    return lambda network: trainer.train(*network, quiet=True)


class Trainer:
    """Trains any of the networks of a finished search.

    Raises:
        UserError: there is none, it was made on other data, or controls are missing.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = make_accelerator(config)
        self.searched = RunFolder(config.output)
        self.run = RunFolder(self.searched / run_folder.ADAPT)
        self.architecture = load_architecture(self.searched / run_folder.ARCHITECTURE)
        self.searched.check_settings(config, image_settings(config))
        network_names(config.adapt.controls)
        self.data = load_inspected(config, self.accelerator)
        split = self.searched.load_split()
        split.check(self.data)
        self.images = sorted(split.weight + split.alpha)

    def folder(self, name: str, seed: int) -> RunFolder:
        """Where a network is kept."""
        return RunFolder(self.run / network_folder(name) / str(seed))

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether a network has been trained to its end."""
        return (self.folder(name, seed) / run_folder.WEIGHTS).exists()

    def train(self, name: str, seed: int, *, quiet: bool = False) -> None:
        """Train one network to its end, from its last finished epoch if it was broken off."""
        own, title = self.folder(name, seed), f"{name}, seed {seed}"
        training = Training(
            self._network(name, seed), self.config, self.data, self.images, seed, self.accelerator
        )
        checkpoint = own.load_checkpoint()
        if checkpoint is not None:
            with own.restoring():
                training.restore(checkpoint)
        training.train(own, title, quiet=quiet)
        if quiet:
            print(epoch_line(training.history[-1], title), flush=True)
        on_main(lambda: own.write_weights(run_folder.WEIGHTS, training.tensors()))

    def _network(self, name: str, seed: int) -> nn.Module:
        config = self.config
        if name != SEARCHED or config.adapt.start == "scratch":
            initial = None if config.model.weights == TEACHER else config.model.weights
            return build_network(name, self.architecture, seed, initial)
        return inherited_network(
            self.searched, config, self.data, self.images, seed, self.accelerator
        )
