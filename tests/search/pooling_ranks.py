"""A loop of one's own in one of several processes, which then tells what it has come to."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metapool_kernels.search import PoolingSearch
from metapool_kernels.search.method.stopping import ProgressiveStopping, Stop
from metapool_kernels.search.settings.config import StopConfig
from tests.search.networks import Small


def never(self: ProgressiveStopping, epoch: int, importances: object) -> list[Stop]:
    raise AssertionError("only the main process decides which layers stop")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank:
        ProgressiveStopping.check = never  # type: ignore[method-assign]
    torch.manual_seed(0)
    network = Small(num_classes=4, in_chans=1)
    search = PoolingSearch(
        network,
        torch.zeros(1, 1, 8, 8),
        r"stem\.0|mid",
        epochs=6,
        warmup=0,
        extra_candidates=["coordinate_attention"],
        stop=StopConfig(rule="perturbation", batches=1, patience=2),
    )
    drawn = torch.Generator().manual_seed(rank)
    seen = [(torch.randn(8, 1, 8, 8, generator=drawn), torch.arange(8) % 4) for _ in range(2)]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    search.alpha_optimizer = torch.optim.SGD(search.supernet.alphas(search.layers), 0.5)
    own = search.gradient(lambda net: loss(net, seen[0]))
    before = torch.cat([alpha.detach().clone() for alpha in search.supernet.alphas(search.layers)])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    model = DistributedDataParallel(network)
    moved = None
    while search.stopping.open_layers:
        search.alpha_step(lambda net: loss(net, seen[0]))
        if moved is None:
            moved = torch.cat(list(search.supernet.alphas(search.layers))).detach() - before
        loss(model, seen[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if search.end_epoch([lambda net: loss(net, seen[0])], optimizer=optimizer):
            model = DistributedDataParallel(network)
    search.save(folder / "search")
    told = {
        "seen": seen[0][0].sum().item(),
        "first": torch.cat(own.gradients),
        "moved": moved,
        "stopped_alphas": search.stopped_alphas,
        "stopping": search.stopping.state_dict(),
        "weights": {name: tensor.detach() for name, tensor in network.named_parameters()},
    }

    torch.save(told, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
