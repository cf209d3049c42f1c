"""Enhancers under DDP and FSDP: two processes that share a batch train as one process does.

The ranks are processes of their own: this one never joins a group.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import NormalizedMetaPool2d, SpatialEnhancer
from metapool_kernels.dispatch import BACKENDS as PREDICATES
from tests.backends import BACKENDS

ROOT = Path(__file__).parents[2]
WORLD = 2
LIMIT = 300
"""Seconds that the ranks have together."""

pytestmark = [
    pytest.mark.skipif("reference" not in BACKENDS, reason="the ranks run on the CPU"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch was built without gloo",
    ),
]


def make_network(backend: str) -> nn.Sequential:
    """Two enhancers between convolutions, one with a mixture for each channel.

    In evaluation, so that normalisation does not depend on how a batch is shared.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        SpatialEnhancer(5, backend=backend),
        nn.Conv2d(5, 6, 1),
        SpatialEnhancer(6, per_channel=True, backend=backend),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return network.double().eval()


def batch() -> tuple[Tensor, Tensor]:
    """Four images and their labels."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 11, 9, generator=rng, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1, 2])


def train(network: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Three steps; returns the loss before each."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wrap_ddp(network: nn.Sequential) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network)


def wrap_fsdp2(network: nn.Sequential) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in network:
        if isinstance(module, SpatialEnhancer):
            fully_shard(module, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def wrap_fsdp1(network: nn.Sequential) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({SpatialEnhancer})
    return FullyShardedDataParallel(
        network, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


WRAPPERS = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp2, "fsdp1": wrap_fsdp1}


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under their own names, gathered from both processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(network, FullyShardedDataParallel):
        # Whatever it wraps, its state_dict() dies of freed memory on the CPU of torch 2.10 to 2.13.
        with FullyShardedDataParallel.summon_full_params(network, writeback=False):
            named = [*network.named_parameters(), *network.named_buffers()]
            return {name: tensor.detach().clone() for name, tensor in named}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(network, options=options))


SHARES = slice(0, 3), slice(3, 4)
"""Of the batch, for processes whose statistics count together: not the same number for each."""


def make_synced(backend: str, group: object = None) -> nn.Sequential:
    """Poolings that are normalised by the statistics of all processes of a group."""
    torch.manual_seed(0)
    pool = NormalizedMetaPool2d(5, per_channel=True, process_group=group, backend=backend)
    with torch.no_grad():
        pool.alpha.mul_(1000)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), pool, nn.Hardswish(), nn.AdaptiveAvgPool2d(1))
    return network.append(nn.Flatten()).append(nn.Linear(5, 4)).double()


def derivatives(
    network: nn.Sequential, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of a sum over images, and a product with its Hessian; the statistics that run."""
    parameters = dict(network.named_parameters())
    loss = nn.functional.cross_entropy(network(images), labels, reduction="sum")
    plain = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    along = sum((grad * grad.new_ones(grad.shape)).sum() for grad in twice)
    assert isinstance(along, Tensor)
    second = torch.autograd.grad(along, list(parameters.values()))
    found = dict(network.named_buffers())
    for order, grads in (("first", plain), ("again", twice), ("second", second)):
        found |= {f"{order} {name}": g for name, g in zip(parameters, grads, strict=True)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}, [loss.item()]


def rank_main(rank: int, backends: list[str], folder: Path) -> None:
    """One of the processes: trains on its share, under each wrapper, and writes what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    found = {}
    for kind, wrap in WRAPPERS.items():
        for backend in backends:
            network = wrap(make_network(backend))
            losses = train(network, *(tensor.chunk(WORLD)[rank] for tensor in batch()))
            found[kind, backend] = whole_state(network), losses
    for backend in backends:
        network = make_synced(backend, torch.distributed.group.WORLD)
        found["synced", backend] = derivatives(
            network, *(tensor[SHARES[rank]] for tensor in batch())
        )
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _codes(started: "list[subprocess.Popen[bytes]]") -> list[int | str]:
    """How they ended: all of them, or up to the first that failed, which the others wait for."""
    deadline = time.monotonic() + LIMIT
    codes = [process.poll() for process in started]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.05)
        codes = [process.poll() for process in started]
    return ["nothing, and was killed" if code is None else code for code in codes]


Found = dict[tuple[str, str], tuple[dict[str, Tensor], list[float]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    usable = [name for name in BACKENDS if PREDICATES[name](torch.empty(1)) is None]
    code = "from pathlib import Path; from tests.pytorch.test_distributed import rank_main\n"
    environment = dict(os.environ)
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the machine may lead nowhere
    started = []
    try:
        for rank in range(WORLD):
            call = f"{code}rank_main({rank}, {usable}, Path({str(folder)!r}))"
            with (folder / f"{rank}.err").open("w") as said:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-c", call], cwd=ROOT, env=environment, stderr=said
                    )
                )
        codes = _codes(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        ends = (
            f"rank {rank} ended with {code}:\n{(folder / f'{rank}.err').read_text()}"
            for rank, code in enumerate(codes)
        )
        pytest.fail("\n".join(ends))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_two_processes_learn_what_one_does(backend: str, kind: str, ranks: list[Found]) -> None:
    network = make_network(backend)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    losses = train(network, *batch())
    right = network.state_dict()
    results = [found[kind, backend] for found in ranks]
    for shares in zip(losses, *(found for _, found in results), strict=True):
        whole, *halves = shares
        assert sum(halves) / WORLD == pytest.approx(whole, rel=1e-12)
        assert halves[0] != halves[1], "both had the same images"
    states = [state for state, _ in results if state]
    assert states, "FSDP hands the whole state to the first rank alone, the others to both"
    for state in states:
        assert state.keys() == right.keys()
        for name, value in right.items():
            assert torch.allclose(state[name], value, rtol=1e-10, atol=1e-12), name
            if name.endswith("alpha"):
                assert not torch.allclose(state[name], start[name], rtol=1e-3), "nothing learnt"
        make_network(backend).load_state_dict(state)


def test_statistics_of_all_processes(backend: str, ranks: list[Found]) -> None:
    """As one process has them, and derivatives of both orders; with batches of different sizes."""
    right, losses = derivatives(make_synced(backend), *batch())
    states, halves = zip(*(found["synced", backend] for found in ranks), strict=True)
    assert sum(half[0] for half in halves) == pytest.approx(losses[0], rel=1e-12)
    for name, value in right.items():
        parts = [state[name] for state in states]
        got = sum(parts) if " " in name else parts[0]  # gradients add up, statistics are the same
        assert torch.allclose(got, value, rtol=1e-9, atol=1e-11), name
        assert " " in name or torch.equal(*parts)
    alone, _ = derivatives(make_synced(backend), *(tensor[SHARES[0]] for tensor in batch()))
    assert not torch.allclose(alone["first 0.weight"], states[0]["first 0.weight"], rtol=1e-3)
