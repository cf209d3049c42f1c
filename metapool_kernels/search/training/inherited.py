"""The network that was found, with the weights that the search has left."""

from collections.abc import Sequence
from itertools import islice
from math import ceil

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from metapool_kernels.search.data.splits import Data, training_batches
from metapool_kernels.search.machine.processes import seed_epoch
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.networks.norms import measure_norms
from metapool_kernels.search.run.run_folder import ARCHITECTURE, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.steps import to_device


def inherited_network(
    searched: RunFolder,
    config: Config,
    data: Data,
    images: Sequence[int],
    seed: int,
    accelerator: Accelerator,
) -> nn.Module:
    """What a search ends with, on its device, its BatchNorm statistics measured on ``images``.

    Those of the supernet come from epochs in which some layers still mixed.

    Raises:
        UserError: the search is not finished, or its files do not belong together.
    """
    network = derive(load_architecture(searched / ARCHITECTURE), seed, searched.load_weights())
    network.to(accelerator.device)
    epoch_seed = seed_epoch(accelerator, seed, 0)
    batches = training_batches(data.train_set, images, config.data, seed, 0, epoch_seed=epoch_seed)
    count = ceil(len(images) / config.data.batch_size)
    with accelerator.autocast():
        measure_norms(to_device(islice(batches, count), accelerator.device), network)
    broadcast(list(network.buffers()))  # each process has drawn its own augmentation
    return network
