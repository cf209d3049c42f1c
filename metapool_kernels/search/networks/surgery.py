"""Put enhancers into any network, by the names of the modules that they follow."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from metapool_kernels import DEFAULT_CANDIDATES, SpatialEnhancer
from metapool_kernels.search.machine.console import format_table
from metapool_kernels.search.networks.attention import make_extra_candidates


@dataclass(frozen=True)
class Site:
    """A place for an enhancer: after which module, and the maps that come out there."""

    name: str
    type_name: str
    channels: int
    map_size: tuple[int, int]


def add_enhancers(
    model: nn.Module,
    example: Any,
    after: str,
    *,
    after_type: str | None = None,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    extra_candidates: Sequence[str] = (),
    count_include_pad: bool = True,
    candidate_norm: bool = False,
    dry_run: bool = False,
) -> list[Site]:
    """Put an enhancer after every module of ``model`` that has such a name, in place.

    Args:
        model: any network.
        example: input for one forward pass, such as zeros of shape (1, C, H, W); a tuple holds
            several arguments, a dict those by name.
        after: regular expression for the whole name of a module.
        after_type: name of a class; of the modules that match, only those of this class.
        candidates: the poolings to choose from, see :func:`metapool_kernels.fused_meta_pool`.
        extra_candidates: names out of
            :data:`metapool_kernels.search.networks.attention.EXTRA_CANDIDATES`.
        count_include_pad: whether the padding counts in the divisor of an average.
        candidate_norm: whether each pooling is batch-normalised before it is weighted, as in DARTS.
        dry_run: change nothing; :func:`site_table` prints what comes back.

    Returns:
        Where the enhancers are, or would be, in the order in which ``model`` runs.

    Raises:
        ValueError: as for :func:`find_sites`, or a candidate that there is not.

    After training, :func:`metapool_kernels.search.networks.derive.derive_network` keeps the best.
    """
    sites = find_sites(model, after, example, type_name=after_type)
    if not dry_run:
        insert_enhancers(
            model,
            sites,
            candidates,
            extra_candidates=extra_candidates,
            count_include_pad=count_include_pad,
            candidate_norm=candidate_norm,
        )
    return sites


def find_sites(
    model: nn.Module, pattern: str, example: Any, *, type_name: str | None = None
) -> list[Site]:
    """Where enhancers would go, in the order in which ``model`` runs. Changes nothing.

    Args:
        model: any network.
        pattern: regular expression for the whole name of a module.
        example: input for one forward pass, as for :func:`add_enhancers`.
        type_name: name of a class; of the modules that match, only those of this class.

    Raises:
        ValueError: the pattern is no regular expression or matches nothing (of that class), or a
            matching module lies in another one, has an enhancer, is not run exactly once or gives
            no (N, C, H, W) tensor, or the network does not run what is put into its place.
    """
    modules = _matching(model, pattern, type_name)
    outputs: dict[str, list[object]] = {name: [] for name in modules}
    run_order: list[str] = []

    def note(name: str, module: nn.Module, args: object, output: object) -> None:
        outputs[name].append(output)
        run_order.append(name)

    training = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            _call(model.eval(), example)
            for hook in hooks:
                hook.remove()
            _check_outputs(modules, outputs)
            _check_places(model, modules, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training
    return [_site(name, modules[name], outputs[name][0]) for name in run_order]


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, tuple):
        model(*example)
    else:
        model(example)


_NO_IMAGE = (1, 1, 1)


def image_shape(example: Any) -> tuple[int, int, int]:
    """Of the first image in an example, (C, H, W); ones where there is none."""
    if isinstance(example, Tensor) and example.dim() >= 3:
        channels, height, width = example.shape[-3:]
        return channels, height, width
    parts = list(example.values()) if isinstance(example, Mapping) else example
    shapes = map(image_shape, parts if isinstance(parts, (list, tuple)) else ())
    return next((shape for shape in shapes if shape != _NO_IMAGE), _NO_IMAGE)


def _check_outputs(
    modules: Mapping[str, nn.Module], outputs: Mapping[str, Sequence[object]]
) -> None:
    """Refuse modules that do not run once and give one (N, C, H, W) tensor."""
    for name, seen in outputs.items():
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 4:
            raise ValueError(
                f"{name!r} cannot be followed by an enhancer: it should run once and give one "
                f"(N, C, H, W) tensor, it gave {[getattr(o, 'shape', type(o)) for o in seen]}"
            )
        # What LayerNorm is over are channels; its own subclasses for (N, C, H, W) permute.
        channels = {
            inner.normalized_shape[-1]
            for inner in modules[name].modules()
            if isinstance(inner, nn.LayerNorm)
        }
        if seen[0].shape[-1] in channels and seen[0].shape[1] not in channels:
            raise ValueError(
                f"{name!r} cannot be followed by an enhancer: it gives (N, H, W, C), here "
                f"{tuple(seen[0].shape)}, and not (N, C, H, W)"
            )


def _check_places(model: nn.Module, modules: Mapping[str, nn.Module], example: Any) -> None:
    """Refuse modules whose place the network does not run, by putting others there for once.

    It may have one under a second name, in a list, compiled, or want more of it than its output.
    """
    runs = dict.fromkeys(modules, 0)

    def count(name: str, module: nn.Module, args: object, output: object) -> None:
        runs[name] += 1

    try:
        for name in modules:
            follower = nn.Identity()
            follower.register_forward_hook(partial(count, name))
            _follow(model, name, follower)
        _call(model, example)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{', '.join(map(repr, modules))} cannot be followed by enhancers: the network wants "
            f"more of them than the output for one input ({error}); take modules inside them or "
            "behind them"
        ) from error
    finally:
        for name, host in modules.items():
            model.set_submodule(name, host)
    passed_by = [name for name, times in runs.items() if times != 1]
    if passed_by:
        raise ValueError(
            f"{', '.join(map(repr, passed_by))} cannot be followed by enhancers: the network runs "
            "them under another name, out of a list or as they were compiled, and would pass the "
            "enhancers by"
        )


def _follow(model: nn.Module, name: str, follower: nn.Module) -> None:
    host = model.get_submodule(name)
    followed = nn.Sequential(OrderedDict(host=host, enhancer=follower))
    followed.training = host.training
    model.set_submodule(name, followed)


def _matching(model: nn.Module, pattern: str, type_name: str | None) -> dict[str, nn.Module]:
    try:
        matching = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    named = {name: module for name, module in model.named_modules() if matching(name)}
    if not named:
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"{pattern!r} matches no module; there are {len(names)}, such as {names[-1:]}"
        )
    modules = {n: m for n, m in named.items() if type_name in (None, type(m).__name__)}
    if not modules:
        classes = sorted({type(module).__name__ for module in named.values()})
        raise ValueError(
            f"of the modules that {pattern!r} matches none is a {type_name!r}; they are "
            f"{', '.join(classes)}"
        )
    enhanced = [
        name.removesuffix(".enhancer")
        for name, module in model.named_modules()
        if isinstance(module, SpatialEnhancer)
    ]
    for name in modules:
        inside = [other for other in modules if other.startswith(f"{name}.") or not name]
        if inside:
            raise ValueError(f"{pattern!r} matches {name!r} and also {inside[0]!r} inside it")
        if any(name == other or name.startswith(f"{other}.") for other in enhanced):
            raise ValueError(f"{pattern!r} matches {name!r}, which has an enhancer already")
    return modules


def _site(name: str, module: nn.Module, output: object) -> Site:
    assert isinstance(output, Tensor)
    return Site(name, type(module).__name__, output.shape[1], (output.shape[2], output.shape[3]))


def site_table(sites: Sequence[Site]) -> str:
    """One line per site: after which module, and the maps that come out there."""
    return format_table(
        ("after", "class", "channels", "map"),
        [
            (site.name, site.type_name, str(site.channels), "x".join(map(str, site.map_size)))
            for site in sites
        ],
    )


def insert_enhancers(
    model: nn.Module,
    sites: Iterable[Site],
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    extra_candidates: Sequence[str] = (),
    count_include_pad: bool = True,
    candidate_norm: bool = False,
) -> dict[str, SpatialEnhancer]:
    """Follow the module of each site by a new enhancer, in place.

    Returns:
        The enhancers by the name of their site, in the order of ``sites``.

    Raises:
        AttributeError: a name that ``model`` does not have.
        ValueError: a candidate that there is not.
    """
    return {
        site.name: insert_enhancer(
            model,
            site.name,
            site.channels,
            candidates,
            extra_candidates=extra_candidates,
            count_include_pad=count_include_pad,
            candidate_norm=candidate_norm,
        )
        for site in sites
    }


def insert_enhancer(
    model: nn.Module,
    name: str,
    channels: int,
    candidates: Sequence[str],
    *,
    extra_candidates: Sequence[str] = (),
    count_include_pad: bool = True,
    candidate_norm: bool = False,
) -> SpatialEnhancer:
    """Follow one module by a new enhancer, in place, and return it.

    The module and its enhancer become ``name.host`` and ``name.enhancer``. The enhancer takes
    device and dtype from the parameters of the module, or else of ``model``.

    Raises:
        AttributeError: ``model`` has no such module.
        ValueError: a candidate that there is not.
    """
    host = model.get_submodule(name)
    enhancer = SpatialEnhancer(
        channels,
        candidates,
        candidate_norm=candidate_norm,
        count_include_pad=count_include_pad,
        extra_candidates=make_extra_candidates(extra_candidates, channels),
    ).train(host.training)
    like = next(chain(host.parameters(), model.parameters()), None)
    if like is not None:
        enhancer.to(like.device, like.dtype)
    _follow(model, name, enhancer)
    return enhancer
