"""A whole training step: MobileNetV2 with an enhancer after each depthwise convolution."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.cases import EAGER_NETWORK, NO_CANDIDATES, OUR_NETWORK, PLAIN_NETWORK
from benches.peers import COUNT_INCLUDE_PAD, STRIDE
from benches.timing import Effort, Times, interleave
from metapool_kernels import DEFAULT_CANDIDATES, SpatialEnhancer, reference
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.surgery import find_sites, insert_enhancers

AFTER = r"blocks\.[1-6]\.\d+\.bn2"
ENHANCERS = 16


class _EagerMix(nn.Module):
    """The pooling of an enhancer in plain PyTorch."""

    def __init__(self, alpha: nn.Parameter) -> None:
        super().__init__()
        self.alpha = alpha
        self.candidates = parse_candidates(DEFAULT_CANDIDATES)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.alpha.softmax(-1).to(x.dtype)
        return reference.mix(x, weights, self.candidates, STRIDE, COUNT_INCLUDE_PAD)


def build_network(kind: str, image: tuple[int, int, int], backend: str | None = None) -> nn.Module:
    """The network, with the same weights for every kind, and our op by a backend."""
    model = Backbone("mobilenetv2_100", {}, True, image).build(seed=0)
    if kind == PLAIN_NETWORK:
        return model.train()
    sites = find_sites(model, AFTER, torch.zeros(1, *image))
    assert len(sites) == ENHANCERS
    names = ("skip_connect",) if kind == NO_CANDIDATES else DEFAULT_CANDIDATES
    for enhancer in insert_enhancers(model, sites, names).values():
        if kind == EAGER_NETWORK:
            _make_eager(enhancer)
        else:
            enhancer.pool.backend = backend
    return model.train()


def _make_eager(enhancer: SpatialEnhancer) -> None:
    alpha = enhancer.pool.alpha
    assert isinstance(alpha, nn.Parameter)
    enhancer.pool = _EagerMix(alpha)


def training_step(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], Tensor]:
    """Forward, cross entropy, backward and an update of all weights and alphas."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def measure_network(quick: bool) -> dict[str, Times]:
    """The three networks in turn: batch 8 of 224 x 224 images, float32, channels_last."""
    batch, side = (2, 96) if quick else (8, 224)
    # The aim is a tenth of a step, which few samples on a shared machine do not show.
    effort = Effort(seconds=5, least=4) if quick else Effort(seconds=30, least=6)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=rng).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), generator=rng)
    kinds = (OUR_NETWORK, NO_CANDIDATES, EAGER_NETWORK)
    models = {kind: build_network(kind, (3, side, side)) for kind in kinds}
    _check(models[OUR_NETWORK], models[EAGER_NETWORK], x)
    steps = {kind: training_step(model, x, labels) for kind, model in models.items()}
    return interleave(steps, effort)


def _check(ours: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Withhold all figures if the fused network computes something else than the eager one."""
    with torch.no_grad():
        eager.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.eval()(x), eager.eval()(x), atol=1e-3, rtol=1e-3)
    ours.train()
    eager.train()
