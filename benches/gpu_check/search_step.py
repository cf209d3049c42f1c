"""A step of the search on a whole MobileNetV2."""

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from metapool_kernels.search.method.bilevel import Hypergradient, hypergradient, with_beside
from metapool_kernels.search.networks.backbone import make_backbone
from metapool_kernels.search.networks.supernet import build_supernet
from metapool_kernels.search.settings.config import AlphaConfig, ModelConfig, WeightConfig
from metapool_kernels.search.training.objective import network_objective
from metapool_kernels.search.training.optimizers import (
    alpha_step,
    make_alpha_optimizer,
    make_weight_optimizer,
)
from metapool_kernels.search.training.steps import batch_loss, weight_step

CLASSES = 1000


def make_accelerator(device: str) -> Accelerator:
    """bfloat16 on a GPU, float32 elsewhere; every one of a process has to ask for the same."""
    on_gpu = device == "cuda"
    return Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu)


class SearchStep:
    """One step of both levels, first-order, on a batch that stays on the device.

    In bfloat16 on a GPU, in float32 elsewhere; ``backend`` None is the automatic choice.
    """

    def __init__(self, device: str, backend: str | None, batch: int, side: int) -> None:
        self.accelerator = make_accelerator(device)
        self.device = self.accelerator.device
        config = ModelConfig()
        self.supernet = build_supernet(
            make_backbone(config, (3, side, side), CLASSES), config, seed=0
        )
        self.model = self.supernet.model.to(self.device, memory_format=torch.channels_last).train()
        self.layers = [site.name for site in self.supernet.sites]
        for layer in self.layers:
            self.model.get_submodule(layer).enhancer.pool.backend = backend
        self.weights = self.supernet.weights()
        self.alphas = self.supernet.alphas(self.layers)
        self.settings = WeightConfig()
        weights = list(self.weights.values())
        self.weight_optimizer, _ = make_weight_optimizer(weights, self.settings, 100)
        self.alpha_optimizer = make_alpha_optimizer(self.alphas, AlphaConfig())
        images = torch.randn(batch, 3, side, side, device=self.device)
        targets = torch.randint(CLASSES, (batch,), device=self.device)
        self.batch = (images.to(memory_format=torch.channels_last), targets)
        self.objective = network_objective(
            self.model,
            list(self.weights),
            [self.supernet.alpha_name(layer) for layer in self.layers],
        )
        self.loss = partial(
            batch_loss,
            batch=self.batch,
            label_smoothing=self.settings.label_smoothing,
            autocast=self.accelerator.autocast,
        )

    def _gradients(self) -> Hypergradient:
        weights = list(self.weights.values())
        return hypergradient(self.objective, weights, self.alphas, self.loss, self.loss)

    def rehearse(self) -> None:
        """Call all kernels of a step, and leave everything as it was."""
        self._gradients()
        leaves = [weight.detach().requires_grad_() for weight in self.weights.values()]
        loss, _ = with_beside(self.objective(leaves, self.alphas, self.loss))
        torch.autograd.grad(loss, leaves)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Loss and accuracy before the step of the weights."""
        alpha_step(self.alphas, self.alpha_optimizer, [self._gradients()])
        return weight_step(
            self.accelerator, self.model, [self.batch], self.weight_optimizer, self.settings
        )
