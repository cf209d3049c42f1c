"""``metapool adapt``: train the network that was found, and its controls, at the same budget."""

from collections.abc import Sequence
from itertools import islice
from math import ceil

from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import update_bn

from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import Architecture, load_architecture
from metapool_kernels.search.backbone import TEACHER
from metapool_kernels.search.config import Config
from metapool_kernels.search.controls import build_network, network_names
from metapool_kernels.search.data import Data, image_settings, training_batches
from metapool_kernels.search.datasets import load_data
from metapool_kernels.search.derive import derive
from metapool_kernels.search.plot import draw
from metapool_kernels.search.processes import make_accelerator, on_main, seed_epoch
from metapool_kernels.search.run_folder import SEARCHED, RunFolder
from metapool_kernels.search.steps import to_device
from metapool_kernels.search.training import Training

SETTINGS = ("seed", "threads", "precision", "data", "adapt")
"""The fields of the configuration that the training depends on."""


def run_adapt(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Train all networks, with each seed, in the same order of images.

    Raises:
        UserError: there is no finished search, it was made on other data, or the networks have
            been trained already and neither ``resume`` nor ``overwrite`` was asked for.
    """
    accelerator = make_accelerator(config)
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    searched.check_settings(config, image_settings(config))
    with accelerator.local_main_process_first():
        data = load_data(config)
    split = searched.load_split()
    split.check(data)
    names = network_names(config.adapt.controls)
    images = sorted(split.weight + split.alpha)

    run = RunFolder(searched / run_folder.ADAPT)

    def begin() -> None:
        run.begin(config, SETTINGS, resume=resume, overwrite=overwrite)
        # They show networks that are gone, or will be before long.
        searched.remove(run_folder.EVALUATION, run_folder.CONTROLS, run_folder.EXPORT)

    on_main(accelerator, begin)
    for seed in range(config.seed, config.seed + config.adapt.seeds):
        for name in names:
            own = RunFolder(run / name / str(seed))
            if not (own / run_folder.WEIGHTS).exists():
                network = _network(
                    name, architecture, seed, config, searched, data, images, accelerator
                )
                training = Training(network, config, data, images, seed, accelerator)
                _train(training, own, f"{name}, seed {seed}")
    on_main(accelerator, lambda: draw(searched))


def _train(training: Training, run: RunFolder, name: str) -> None:
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        with run.restoring():
            training.restore(checkpoint)
    training.train(run, name)
    on_main(training.accelerator, lambda: run.write_weights(run_folder.WEIGHTS, training.tensors()))


def _network(
    name: str,
    architecture: Architecture,
    seed: int,
    config: Config,
    searched: RunFolder,
    data: Data,
    images: Sequence[int],
    accelerator: Accelerator,
) -> nn.Module:
    if name != SEARCHED or config.adapt.start == "scratch":
        initial = None if config.model.weights == TEACHER else config.model.weights
        return build_network(name, architecture, seed, initial)
    model = derive(architecture, seed, searched.load_weights()).to(accelerator.device)
    epoch_seed = seed_epoch(accelerator, seed, 0)
    batches = training_batches(data.train_set, images, config.data, seed, 0, epoch_seed=epoch_seed)
    # Its BatchNorm statistics are those of the supernet, in which some layers still mixed.
    count = ceil(len(images) / config.data.batch_size)
    update_bn(to_device(islice(batches, count), accelerator.device), model)
    return model
