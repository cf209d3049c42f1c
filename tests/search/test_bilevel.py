"""The hypergradient of each method: against closed forms, differences and each other."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metapool_kernels import MetaPool2d
from metapool_kernels.search.method import bilevel
from metapool_kernels.search.method.bilevel import draw_tasks, hypergradient, tilted
from metapool_kernels.search.settings.config import Method
from metapool_kernels.search.training.objective import network_objective
from tests.search.losses import loss_of

METHODS: list[Method] = ["first-order", "fomaml", "second-order", "finite-difference"]
XI, TILT = 0.3, 1.2
TASKS: list[list[int | None]] = [[None], [2], [0, 3]]


class Quadratic:
    """L_train = w'Aw / 2 - w'Bm, L_val = |Cw - d|^2 / 2 + w'Em, with m = softmax(alpha)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.a, self.b, self.c, self.d, self.e = (
            draw(5, 5),
            draw(5, 4),
            draw(3, 5),
            draw(3),
            draw(5, 4),
        )
        self.a = self.a @ self.a.T
        self.w, self.alpha = draw(5), draw(4)

    def __call__(
        self, weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: str
    ) -> tuple[Tensor, Tensor]:
        w, m = torch.cat(list(weights)), alphas[0].softmax(0)
        if batch == "train":
            loss = w @ self.a @ w / 2 - w @ self.b @ m
        else:
            loss = (self.c @ w - self.d).square().sum() / 2 + w @ self.e @ m
        return loss, torch.tensor(50.0)

    def loss_and_gradient(self, method: Method, task: int | None) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.clone()
        if task is not None:
            alpha[task] += TILT
        m = alpha.softmax(0)
        jacobian = torch.diag(m) - torch.outer(m, m)
        w = self.w
        if method != "first-order":
            w = w - XI * (self.a @ w - self.b @ m)
        residual = self.c @ w - self.d
        along_m = self.e.T @ w
        if method in ("second-order", "finite-difference"):
            along_m = along_m + XI * self.b.T @ (self.c.T @ residual + self.e @ m)
        return residual.square().sum() / 2 + w @ self.e @ m, jacobian @ along_m


@pytest.mark.parametrize("tasks", TASKS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_closed_form(method: Method, tasks: list[int | None]) -> None:
    problem = Quadratic()
    found = hypergradient(
        problem,
        problem.w.split([2, 3]),
        [problem.alpha],
        "train",
        "val",
        method=method,
        xi=XI,
        tasks=tasks,
        tilt=TILT,
    )
    expected = [problem.loss_and_gradient(method, task) for task in tasks]
    losses, gradients = zip(*expected, strict=True)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())
    torch.testing.assert_close(found.gradients, [torch.stack(gradients).mean(0)])
    assert [beside.item() for beside in found.beside] == [50] * len(tasks)


def test_the_methods_differ() -> None:
    """Otherwise the closed forms above would prove less than they seem to."""
    problem = Quadratic()
    gradients = [problem.loss_and_gradient(method, 1)[1] for method in METHODS[:3]]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (gradients[one] - gradients[other]).abs().max() > 0.1


class Network(nn.Module):
    """Two mixtures between convolutions, BatchNorm in training mode, smooth elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        candidates = ("skip_connect", "avg_pool_3x3", "max_pool_3x3", "avg_pool_5x5")
        self.stem, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 3)
        self.pools = nn.ModuleList(MetaPool2d(candidates) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for pool, norm in zip(self.pools, self.norms, strict=True):
            x = torch.tanh(norm(pool(x)))
        out: Tensor = self.head(x.square().mean((2, 3)))
        return out


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def parts(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    named = dict(network.named_parameters())
    alphas = {name: tensor for name, tensor in named.items() if name.endswith("alpha")}
    return {name: tensor for name, tensor in named.items() if name not in alphas}, alphas


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 2, 9, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (6,), generator=generator)


def gradient(network: Network, method: Method, tasks: Sequence[int | None]) -> list[Tensor]:
    weights, alphas = parts(network)
    return hypergradient(
        network_objective(network, list(weights), list(alphas)),
        list(weights.values()),
        list(alphas.values()),
        loss_of(batch(1)),
        loss_of(batch(2)),
        method=method,
        xi=XI,
        tasks=tasks,
        tilt=TILT,
    ).gradients


@pytest.mark.parametrize("tasks", TASKS, ids=str)
def test_exact_against_finite_difference(
    network: Network, tasks: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short enough that no maximum moves to another pixel in between: there the loss has a kink.
    monkeypatch.setattr(bilevel, "DIFFERENCE_LENGTH", 1e-6)
    exact = gradient(network, "second-order", tasks)
    difference = gradient(network, "finite-difference", tasks)
    dropped = gradient(network, "fomaml", tasks)
    for one, other, without in zip(exact, difference, dropped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
        assert (one - without).norm() > 0.02 * one.norm()


def unrolled_loss(network: Network, alphas: Sequence[Tensor], tasks: Sequence[int | None]) -> float:
    """What the upper level minimises, written out with plain modules and ``backward``."""
    named_weights, named_alphas = parts(network)
    total = 0.0
    for task in tasks:
        mixture = dict(zip(named_alphas, tilted(alphas, task, TILT), strict=True))
        leaves = {n: w.detach().clone().requires_grad_() for n, w in named_weights.items()}
        images, targets = batch(1)
        F.cross_entropy(
            functional_call(network, {**leaves, **mixture}, (images,)), targets
        ).backward()
        stepped = {n: w.detach() - XI * w.grad for n, w in leaves.items() if w.grad is not None}
        images, targets = batch(2)
        logits = functional_call(network, {**stepped, **mixture}, (images,))
        total += F.cross_entropy(logits, targets).item() / len(tasks)
    return total


def test_second_order_is_the_slope_of_the_unrolled_loss(network: Network) -> None:
    """A witness that shares no derivative with the code: differences of the loss itself."""
    tasks: list[int | None] = [1, 3]
    _, alphas = parts(network)
    exact = gradient(network, "second-order", tasks)
    step = 1e-5
    for layer, of_layer in enumerate(exact):
        for k in range(4):
            ends = []
            for sign in (1, -1):
                moved = [alpha.detach().clone() for alpha in alphas.values()]
                moved[layer][k] += sign * step
                ends.append(unrolled_loss(network, moved, tasks))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert of_layer[k].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_is_passed_changes(network: Network, method: Method) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gradient(network, method, [0, 1])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.norms[0].num_batches_tracked == 0


def test_dropout_does_not_disturb_the_finite_difference(network: Network) -> None:
    """Both ends of the difference must drop the same units, or it is off by orders."""
    network.head = nn.Sequential(nn.Dropout(0.5), network.head).double()  # type: ignore[assignment]
    torch.manual_seed(3)
    sizes = [g.norm() for g in gradient(network, "finite-difference", [None])]
    torch.manual_seed(3)
    exact = [g.norm() for g in gradient(network, "second-order", [None])]
    for size, plausible in zip(sizes, exact, strict=True):
        assert size < 10 * plausible


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_ends_of_the_difference_are_as_far_apart_for_any_gradient(scale: float) -> None:
    problem = Quadratic()
    seen = []

    def objective(
        weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: str
    ) -> tuple[Tensor, Tensor]:
        if batch == "train":
            seen.append(torch.cat(list(weights)).detach())
        loss, accuracy = problem(weights, alphas, batch)
        return scale * loss, accuracy

    weights = problem.w.split([2, 3])
    hypergradient(
        objective, weights, [problem.alpha], "train", "val", method="finite-difference", xi=XI
    )
    _, plus, minus = seen
    apart = (plus - minus).norm().item()
    assert apart == pytest.approx(2 * bilevel.DIFFERENCE_LENGTH, rel=1e-6)
    torch.testing.assert_close((plus + minus) / 2, problem.w)


def test_a_validation_loss_that_ignores_the_weights_has_no_second_part() -> None:
    """There the difference has no direction, and no length to divide by."""
    problem = Quadratic()

    def objective(
        weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: str
    ) -> tuple[Tensor, Tensor]:
        if batch == "train":
            return problem(weights, alphas, batch)
        return alphas[0].square().sum() + 0 * weights[0].sum(), torch.tensor(50.0)

    found = hypergradient(
        objective, [problem.w], [problem.alpha], "train", "val", method="finite-difference", xi=XI
    )
    torch.testing.assert_close(found.gradients, [2 * problem.alpha])


@pytest.mark.parametrize("shared", ["module", "parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_and_weights_without_use(
    network: Network, method: Method, shared: str
) -> None:
    network.idle = nn.Linear(3, 3).double()  # type: ignore[assignment]
    if shared == "module":
        network.norms[1] = network.norms[0]
    else:
        network.norms[1].weight = network.norms[0].weight
        network.norms[1].bias = network.norms[0].bias
    before = [id(parameter) for parameter in network.parameters()]
    found = gradient(network, method, [None])
    assert [id(parameter) for parameter in network.parameters()] == before
    # A norm of each layer's own that happens to be equal takes other steps, but begins equal.
    apart = Network().double()
    apart.load_state_dict(
        {name: t for name, t in network.state_dict().items() if not name.startswith("idle")}
    )
    same = method == "first-order"
    for one, other in zip(found, gradient(apart, method, [None]), strict=True):
        assert torch.allclose(one, other) is same


@pytest.mark.parametrize("shared", ["module", "parameter"])
def test_tied_weights_move_in_all_their_places(network: Network, shared: str) -> None:
    if shared == "module":
        network.norms[1] = network.norms[0]
    else:
        network.norms[1].weight = network.norms[0].weight
    weights, alphas = parts(network)
    moved = {name: weight.detach() + torch.rand_like(weight) for name, weight in weights.items()}
    objective = network_objective(network, list(weights), list(alphas))
    loss, _ = objective(list(moved.values()), list(alphas.values()), loss_of(batch(1)))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(moved[name])
    images, targets = batch(1)
    torch.testing.assert_close(loss, F.cross_entropy(network(images), targets))


def test_tasks_are_drawn_without_replacement_and_anew_each_step() -> None:
    steps = [draw_tasks(7, 2, TILT, [0, step]) for step in range(200)]
    assert all(len(set(tasks)) == 2 for tasks in steps)
    drawn = [task for tasks in steps for task in tasks]
    assert {drawn.count(k) for k in range(7)} <= set(range(35, 85))
    assert steps == [draw_tasks(7, 2, TILT, [0, step]) for step in range(200)]
    assert sorted(draw_tasks(3, 9, TILT, [0, 0]), key=str) == [0, 1, 2]


def test_without_a_tilt_there_is_one_task() -> None:
    assert draw_tasks(7, 4, 0.0, [0, 0]) == [None]


def test_a_tilt_multiplies_the_odds_of_its_candidate() -> None:
    alphas = [torch.randn(5), torch.randn(2, 5)]
    for alpha, moved in zip(alphas, tilted(alphas, 3, 4.0), strict=True):
        odds = (moved.softmax(-1) / alpha.softmax(-1)).log()
        expected = torch.zeros(5)
        expected[3] = 4.0
        torch.testing.assert_close(odds - odds[..., :1], expected.expand_as(odds))
