"""What Accelerate does not have a word for: how a run begins, and what its processes agree on."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from numpy.random import SeedSequence
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import Config


def make_accelerator(config: Config) -> Accelerator:
    """Devices, processes, mixed precision and accumulation.

    Raises:
        UserError: the hardware lacks what the configuration asks for, or what has started this
            process asks for something else than DistributedDataParallel.
    """
    # Kept from an earlier run in the same process, which may have had another precision.
    AcceleratorState._reset_state()
    accumulation = GradientAccumulationPlugin(config.data.accumulate, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision, gradient_accumulation_plugin=accumulation
        )
    except ValueError as error:
        raise UserError(f"precision {config.precision} does not work here: {error}") from error
    except ImportError as error:  # a library that ``accelerate launch`` was told to use
        raise UserError(f"Accelerate cannot begin as it was launched: {error}") from error
    _check_launched(accelerator)
    return accelerator


def _check_launched(accelerator: Accelerator) -> None:
    """Refuse what ``accelerate launch`` can ask for and :func:`prepare_model` would pass over."""
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise UserError(f"several processes train by DistributedDataParallel, not {kind}; unset it")
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != "NO":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND is {backend}, and a network that loses candidates while it "
            "is searched is not compiled; unset it"
        )


def check_processes(accelerator: Accelerator, before: int) -> None:
    """Refuse to go on with another number of processes, which would take other steps.

    Raises:
        UserError: ``before`` is another number than that of the processes now.
    """
    if before != accelerator.num_processes:
        raise UserError(
            f"the run was started in {before} processes and cannot go on in "
            f"{accelerator.num_processes}; start as many as before"
        )


def prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """``model`` on its device, for training in all processes; again after it has lost modules.

    DistributedDataParallel would wait for the gradients of parameters that are gone. Accelerate's
    ``prepare_model`` is not asked: it puts the precision into the network itself, and from 1.14 on
    hands back untouched what it has seen before. Here the precision is that of each step.
    """
    model.to(accelerator.device)
    return model if accelerator.num_processes == 1 else DistributedDataParallel(model)


def seed_epoch(accelerator: Accelerator, seed: int, epoch: int) -> int:
    """Seed every generator for one epoch, and return the number.

    All that is drawn in an epoch follows from the run's seed, the epoch and the process; so a run
    that goes on after a finished epoch needs the state of no generator.
    """
    numbers = SeedSequence([seed, epoch, accelerator.process_index]).generate_state(1)
    set_seed(int(numbers[0]))
    return int(numbers[0])
