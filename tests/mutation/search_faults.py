"""Faults in the search: when a layer stops, and how alpha and the weights move."""

from tests.mutation.fault import Fault


def _stopping(name: str, right: str, wrong: str) -> Fault:
    return Fault(name, "stopping rule", "metapool_kernels/search/method/stopping.py", right, wrong)


def _loops(name: str, right: str, wrong: str, file: str = "training/upper_level.py") -> Fault:
    return Fault(name, "loops of others", f"metapool_kernels/search/{file}", right, wrong)


def _bilevel(name: str, right: str, wrong: str, file: str = "method/bilevel.py") -> Fault:
    return Fault(name, "bilevel step", f"metapool_kernels/search/{file}", right, wrong)


def _cost(name: str, right: str, wrong: str, file: str = "method/expected_cost.py") -> Fault:
    return Fault(name, "cost", f"metapool_kernels/search/{file}", right, wrong)


STOPPING = (
    _stopping(
        "a margin of exactly delta is too little",
        "margin(probabilities) >= config.delta",
        "margin(probabilities) > config.delta",
    ),
    _stopping(
        "the last of equals is the best",
        "key=lambda k: -scores[k]",
        "key=lambda k: (-scores[k], -k)",
    ),
    _stopping(
        "checks need not be in a row",
        "times + 1 if found == before else 1)",
        "times + 1 if found == before else times)",
    ),
    _stopping(
        "patience asks for one check more",
        "self.found[layer][1] >= self.config.patience:",
        "self.found[layer][1] > self.config.patience:",
    ),
    _stopping(
        "the average begins at nothing",
        "old = self.averages.get(layer, new)",
        "old = self.averages.get(layer, [0.0] * len(new))",
    ),
    _stopping(
        "the average forgets what it should keep",
        "decay * a + (1 - decay) * b",
        "(1 - decay) * a + decay * b",
    ),
    _stopping(
        "the deadline is an epoch late",
        "        if epoch < self.deadline:",
        "        if epoch <= self.deadline:",
    ),
    _stopping(
        "the entropy is not a share",
        " / math.log(len(probabilities))",
        " / math.log(2)",
    ),
    _stopping(
        "a stopped layer stops again",
        "if layer not in self.stops]",
        "if layer in self.found]",
    ),
    _stopping(
        "alpha decides where the loss should",
        "scores = importances or average",
        "scores = average",
    ),
    _stopping(
        "a warm-up up to the deadline passes",
        "if warmup >= deadline:",
        "if warmup > deadline:",
    ),
)

BILEVEL = (
    _bilevel(
        "fomaml does not step",
        "    return _first_order(objective, stepped, alphas, train, val, xi)\n\n\n"
        "def _second_order(",
        "    return _first_order(objective, w, alphas, train, val, xi)\n\n\ndef _second_order(",
    ),
    _bilevel(
        "the second order is dropped",
        "torch.autograd.grad(loss, free, create_graph=through, materialize_grads=True)",
        "torch.autograd.grad(loss, free, materialize_grads=True)",
    ),
    _bilevel(
        "the difference is divided by half its length",
        "return [(plus - minus) / (2 * epsilon) for",
        "return [(plus - minus) / epsilon for",
    ),
    _bilevel(
        "the length of the difference grows with the gradient",
        "epsilon = DIFFERENCE_LENGTH / norm",
        "epsilon = torch.tensor(DIFFERENCE_LENGTH)",
    ),
    _bilevel(
        "no gradient at all is divided by its length",
        "    if norm == 0:\n",
        "    if norm < 0:\n",
    ),
    _bilevel(
        "both ends of the difference draw other numbers",
        "with torch.random.fork_rng({part.device for part in v if part.is_cuda}):",
        "with torch.random.fork_rng([], enabled=False):",
    ),
    _bilevel(
        "what is not needed counts as important",
        "rises[k] = loss([*alphas[:i], without, *alphas[i + 1 :]]) - whole",
        "rises[k] = whole - loss([*alphas[:i], without, *alphas[i + 1 :]])",
    ),
    _bilevel(
        "each candidate that is left out draws other dropout",
        "with torch.no_grad(), torch.random.fork_rng(devices):",
        "with torch.no_grad():",
    ),
    _bilevel(
        "gradients of tasks are added and not averaged",
        "[torch.stack(one_alpha).mean(0) for one_alpha in",
        "[torch.stack(one_alpha).sum(0) for one_alpha in",
    ),
    _bilevel(
        "a task may be drawn twice",
        "min(tasks, candidates), replace=False)",
        "min(tasks, candidates), replace=True)",
    ),
    _bilevel(
        "statistics of BatchNorm move in the objective",
        "put = {id(buffer): buffer.clone() for buffer in buffers}",
        "put = {id(buffer): buffer for buffer in buffers}",
        file="training/objective.py",
    ),
    _bilevel(
        "what is in lists keeps its own tensors",
        "list: (lambda items: items, lambda items, parts: parts),",
        "list: (lambda items: [], lambda items, parts: parts),",
        file="training/stateless.py",
    ),
    _bilevel(
        "a bound method keeps its own network",
        "lambda method: [method.__func__, method.__self__],",
        "lambda method: [],",
        file="training/stateless.py",
    ),
    _bilevel(
        "a closure keeps its own network",
        "cell if cell == CellType() else cell.cell_contents for cell in cells",
        "cell for cell in cells",
        file="training/stateless.py",
    ),
    _bilevel(
        "what is compiled keeps its own network",
        "            attributes[_COMPILED] = None\n",
        "",
        file="training/stateless.py",
    ),
    _bilevel(
        "a copy keeps the mode in which it was planned",
        "attributes.update(vars(module))",
        "attributes.update(vars(module), training=True)",
        file="training/stateless.py",
    ),
    _bilevel(
        "what is computed is as precise as the weights",
        "    with autocast():\n",
        "    with nullcontext():\n",
        file="training/steps.py",
    ),
    _bilevel(
        "hypergradients are added and not averaged",
        "means = [torch.stack(gradients).mean(0) for gradients in per_alpha]",
        "means = [torch.stack(gradients).sum(0) for gradients in per_alpha]",
        file="training/optimizers.py",
    ),
    _bilevel(
        "gradients of weights are not clipped",
        "    accelerator.clip_grad_norm_(weights, config.clip)\n",
        "",
        file="training/steps.py",
    ),
    _bilevel(
        "labels are not smoothed",
        "F.cross_entropy(logits, targets, label_smoothing=label_smoothing)",
        "F.cross_entropy(logits, targets)",
        file="training/steps.py",
    ),
)

COST = (
    _cost(
        "a stopped layer costs what its best costs, also where it keeps two",
        "self._open.pop(layer)[list(keep)].sum()",
        "self._open.pop(layer)[list(keep)[:1]].sum()",
    ),
    _cost(
        "a stopped layer costs nothing",
        "self.cost.settle(stop.layer, stop.keep)",
        "self.cost.settle(stop.layer, ())",
        file="training/upper_level.py",
    ),
    _cost(
        "the gradient has no weight",
        "torch.autograd.grad(weight * expected, leaves)",
        "torch.autograd.grad(expected, leaves)",
    ),
    _cost(
        "the multiplier falls where the cost is too high",
        "self.multiplier + self._rate * excess",
        "self.multiplier - self._rate * excess",
    ),
    _cost(
        "the multiplier falls below nothing",
        "self.multiplier = max(0.0, self.multiplier + self._rate * excess)",
        "self.multiplier = self.multiplier + self._rate * excess",
    ),
    _cost(
        "cost and multiplier swing",
        "DAMPING = 5.0",
        "DAMPING = 0.0",
    ),
    _cost(
        "a budget below the cheapest choice passes",
        "config.budget < cheapest:",
        "config.budget < 0:",
    ),
    _cost(
        "importances know no cost",
        "return loss + weight * self.of(of_alphas).to(loss)",
        "return loss",
    ),
    _cost(
        "what cost says never reaches alpha",
        "            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient\n",
        "            pass\n",
        file="training/optimizers.py",
    ),
    _cost(
        "a run that goes on begins with the first weight",
        'self.cost.multiplier = state["cost_multiplier"]',
        "pass",
        file="training/upper_level.py",
    ),
    _cost(
        "a run that goes on takes the table as it is by now",
        "table = COSTS.load(own) if resume and own.exists() else load_table(config.search.cost)",
        "table = load_table(config.search.cost)",
        file="commands/search.py",
    ),
    _cost(
        "a search that takes note of costs is another",
        "return list(torch.autograd.grad(weight * expected, leaves)) if weight > 0 else None",
        "return list(torch.autograd.grad((weight or 1.0) * expected, leaves))",
    ),
    _cost(
        "costs are no shares",
        "[layer.costs.get(name, 0.0) / self.skip for name in candidates]",
        "[layer.costs.get(name, 0.0) for name in candidates]",
        file="run/cost_table.py",
    ),
    _cost(
        "a table of another network passes",
        "if own[key] != other[key]]",
        "if key == key.upper()]",
        file="run/cost_table.py",
    ),
    _cost(
        "maps of another size pass",
        "(found.channels, found.map_size) != size:",
        "found.channels != size[0]:",
        file="run/cost_table.py",
    ),
    _cost(
        "a negative cost passes",
        'if not 0 <= cost < math.inf:\n                raise ValueError(f"{candidate} in',
        'if not cost < math.inf:\n                raise ValueError(f"{candidate} in',
        file="run/cost_table.py",
    ),
    _cost(
        "what is not known costs nothing",
        "                    return None\n                total +=",
        "                    pass\n                total +=",
        file="run/cost_table.py",
    ),
    _cost(
        "a candidate faster than nothing has a negative cost",
        "max(0.0, found[_name(place, candidate)] - skip)",
        "found[_name(place, candidate)] - skip",
        file="commands/cost.py",
    ),
    _cost(
        "what is no table is overwritten",
        "        _check_is_table(path)\n    folder",
        "        pass\n    folder",
        file="commands/cost.py",
    ),
    _cost(
        "windows are counted whole",
        "sum(side - 1 for side in sides)",
        "(math.prod(sides) - 1)",
        file="networks/counting.py",
    ),
    _cost(
        "the places of maxima are moved too",
        "if t.is_floating_point())",
        "if t.nbytes)",
        file="networks/counting.py",
    ),
    _cost(
        "a network that another beats is on the front",
        "point.accuracy > best[-1].accuracy:",
        "point.accuracy != best[-1].accuracy:",
        file="report/front_figure.py",
    ),
    _cost(
        "bars are deviations",
        "result.std / math.sqrt(len(result.seeds))",
        "result.std",
        file="report/front_figure.py",
    ),
)

LOOPS = (
    _loops(
        "alpha keeps a gradient, along which an optimizer of all parameters moves it",
        "    optimizer.zero_grad()\n",
        "",
        file="training/optimizers.py",
    ),
    _loops(
        "what has overflown takes a step",
        "if finite_only and not all(",
        "if not finite_only and not all(",
        file="training/optimizers.py",
    ),
    _loops(
        "inner steps are as much longer as losses are larger",
        "xi=(xi or 0.0) / scale,",
        "xi=(xi or 0.0),",
    ),
    _loops(
        "gradients stay as large as losses",
        "[gradient / scale for gradient",
        "[gradient / 1.0 for gradient",
    ),
    _loops(
        "every process decides by itself",
        "stops = on_main(lambda: self.stopping.check(self.epoch, measured))",
        "stops = self.stopping.check(self.epoch, measured)",
    ),
    _loops(
        "gradients of processes are added and not averaged",
        "(flat / process_count())",
        "(flat / 1)",
        file="machine/collective.py",
    ),
    _loops(
        "an optimizer keeps the weights that the network has lost",
        "                if optimizer is not None:\n",
        "                if optimizer is None:\n",
    ),
    _loops(
        "a search that goes on draws the first tasks again",
        'self.step = state.get("step", 0)',
        "self.step = 0",
    ),
    _loops(
        "alpha is learned in the warm-up",
        "self.epoch >= self.warmup and",
        "self.epoch >= 0 and",
    ),
    _loops(
        "the best of an open layer is its worst",
        "weights().argmax())",
        "weights().argmin())",
        file="pooling_search.py",
    ),
    _loops(
        "each round has the order of the first",
        "tell(self.epoch + passed * self.settings.epochs)",
        "tell(self.epoch)",
        file="pooling_search.py",
    ),
)

FAULTS = (*STOPPING, *BILEVEL, *COST, *LOOPS)
