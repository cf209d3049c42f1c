"""What the network that is being searched is expected to cost, and how much that counts.

Sources: Wu et al., "FBNet" (CVPR 2019), and Cai et al., "ProxylessNAS" (ICLR 2019), for an expected
cost beside the loss; Platt and Barr, "Constrained Differential Optimization" (NIPS 1987), for a
multiplier that ascends, and for its damping.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.method.bilevel import Objective, Tensors, with_beside
from metapool_kernels.search.settings.config import CostConfig

RATE = 10.0
"""By how much the multiplier moves at a step: this times alpha's learning rate, for each unit by
which the cost is over its budget."""

DAMPING = 5.0
"""What each such unit adds to the weight at once; without it cost and multiplier swing."""


class ExpectedCost:
    """The sum over the layers of p_j t_j, as a multiple of the network with skip_connect in each.

    Layers that have stopped have the cost of what they keep: that of both where they keep two.

    Attributes:
        multiplier: the weight that one unit of it has beside the loss on the alpha half, without
            the damping of a budget.
    """

    def __init__(
        self, layers: Mapping[str, Sequence[float]], config: CostConfig, alpha_lr: float
    ) -> None:
        """Begin with every layer open.

        Args:
            layers: the cost of each candidate beyond skip_connect, in the order of alpha, as a
                share of the network with skip_connect; in the order in which layers run.
            config: weight and budget.
            alpha_lr: learning rate of alpha.

        Raises:
            UserError: no choice keeps the budget.
        """
        self._open = {layer: torch.tensor(list(costs)) for layer, costs in layers.items()}
        self._settled = 1.0
        self._budget = config.budget
        self._rate = RATE * alpha_lr
        self.multiplier = float(config.weight)
        cheapest = 1 + sum(map(min, layers.values()))
        if config.budget is not None and config.budget < cheapest:
            raise UserError(
                f"search.cost.budget {config.budget:g} cannot be kept: the cheapest candidate in "
                f"each layer makes {cheapest:.4g}"
            )

    def of(self, alphas: Tensors) -> Tensor:
        """The expected cost, differentiable in the alphas of the open layers, in their order."""
        shares = [
            (alpha.softmax(-1) * costs.to(alpha)).sum()
            for alpha, costs in zip(alphas, self._open.values(), strict=True)
        ]
        return torch.stack(shares).sum() + self._settled if shares else torch.tensor(self._settled)

    def weight(self, cost: float) -> float:
        """What one unit weighs where the network is expected to cost ``cost``."""
        if self._budget is None:
            return self.multiplier
        return max(0.0, self.multiplier + DAMPING * (cost - self._budget))

    def step(self, alphas: Tensors) -> list[Tensor] | None:
        """The gradient of the weighted cost in each alpha; the multiplier then moves.

        None where it weighs nothing. It has no tilt: a task is about receptive fields.
        """
        leaves = [alpha.detach().requires_grad_() for alpha in alphas]
        with torch.enable_grad():
            expected = self.of(leaves)
        cost = expected.item()
        weight = self.weight(cost)
        if self._budget is not None:
            excess = cost - self._budget
            self.multiplier = max(0.0, self.multiplier + self._rate * excess)
        return list(torch.autograd.grad(weight * expected, leaves)) if weight > 0 else None

    def beside(self, objective: Objective, alphas: Tensors) -> Objective:
        """The loss and the weighted cost together, with the weight at ``alphas``."""
        weight = self.weight(self.of(alphas).item())

        def both(weights: Tensors, of_alphas: Tensors, batch: Any) -> Tensor:
            loss, _ = with_beside(objective(weights, of_alphas, batch))
            return loss + weight * self.of(of_alphas).to(loss)

        return both if weight > 0 else objective

    def settle(self, layer: str, keep: Sequence[int]) -> None:
        """A layer has stopped and keeps the candidates at some positions."""
        self._settled += self._open.pop(layer)[list(keep)].sum().item()

    def warnings(self) -> list[str]:
        """Whether what the layers have kept costs more than the budget, once all have stopped."""
        if self._budget is None or self._settled <= self._budget:
            return []
        return [
            f"the network that was found costs {self._settled:.3f} times the one with skip_connect "
            f"in every layer, and search.cost.budget is {self._budget:g}; a smaller budget, or "
            "search.stop.keep top-1, makes it cheaper"
        ]

    def numbers(self, alphas: Tensors) -> dict[str, float]:
        """For ``metrics.csv``: what is expected now, and the weight of one unit of it."""
        cost = self.of(alphas).item()
        return {"expected_cost": cost, "cost_weight": self.weight(cost)}
