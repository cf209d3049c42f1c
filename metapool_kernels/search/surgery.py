"""Put enhancers into any network, by the names of the modules that they follow."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from metapool_kernels import DEFAULT_CANDIDATES, SpatialEnhancer


@dataclass(frozen=True)
class Site:
    """A place for an enhancer: after which module, and the maps that come out there."""

    name: str
    channels: int
    map_size: tuple[int, int]


def find_sites(model: nn.Module, pattern: str, example: Tensor) -> list[Site]:
    """Where enhancers would go, in the order in which ``model`` runs. Changes nothing.

    Args:
        model: any network.
        pattern: regular expression for the whole name of a module.
        example: input for one forward pass, such as zeros of shape (1, C, H, W).

    Raises:
        ValueError: the pattern is no regular expression or matches nothing, or a matching module
            lies in another one, is not run exactly once or gives no (N, C, H, W) tensor.
    """
    try:
        matching = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    modules = {name: module for name, module in model.named_modules() if matching(name)}
    if not modules:
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"{pattern!r} matches no module; there are {len(names)}, such as {names[-1]!r}"
        )
    for name in modules:
        inside = [other for other in modules if other.startswith(f"{name}.") or not name]
        if inside:
            raise ValueError(f"{pattern!r} matches {name!r} and also {inside[0]!r} inside it")

    outputs: dict[str, list[object]] = {name: [] for name in modules}
    run_order: list[str] = []

    def note(name: str, module: nn.Module, args: object, output: object) -> None:
        outputs[name].append(output)
        run_order.append(name)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training
    for name, seen in outputs.items():
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 4:
            raise ValueError(
                f"{name!r} cannot be followed by an enhancer: it should run once and give one "
                f"(N, C, H, W) tensor, it gave {[getattr(o, 'shape', type(o)) for o in seen]}"
            )
    return [_site(name, outputs[name][0]) for name in run_order]


def _site(name: str, output: object) -> Site:
    assert isinstance(output, Tensor)
    return Site(name, output.shape[1], (output.shape[2], output.shape[3]))


def insert_enhancers(
    model: nn.Module,
    sites: Iterable[Site],
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    count_include_pad: bool = True,
) -> dict[str, SpatialEnhancer]:
    """Follow the module of each site by a new enhancer, in place.

    The module and its enhancer become ``name.host`` and ``name.enhancer``.

    Returns:
        The enhancers by the name of their site, in the order of ``sites``.

    Raises:
        AttributeError: a name that ``model`` does not have.
        ValueError: a candidate that there is not.
    """
    enhancers = {}
    for site in sites:
        host = model.get_submodule(site.name)
        enhancer = SpatialEnhancer(
            site.channels, candidates, count_include_pad=count_include_pad
        ).train(host.training)
        followed = nn.Sequential(OrderedDict(host=host, enhancer=enhancer))
        model.set_submodule(site.name, followed.train(host.training))
        enhancers[site.name] = enhancer
    return enhancers
