"""Candidates with weights of their own beside the poolings: what they may be, and their mix."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from metapool_kernels.candidates import parse_candidate


def as_modules(extras: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """Extra candidates by name, checked; none for None.

    Raises:
        TypeError: no mapping of names to modules.
        ValueError: a name that is a pooling's, or that cannot be a part of a module.
    """
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(
            f"extra_candidates should map names to modules, got {extras!r} of {type(extras)!r}"
        )
    modules = dict(extras or {})
    taken = nn.ModuleDict()
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"extra candidate {name!r} should be an nn.Module, got {type(module)!r}"
            )
        named = isinstance(name, str) and name.isidentifier() and not _is_pooling(name)
        if not named or hasattr(taken, name):
            raise ValueError(
                f"an extra candidate should be named by letters, digits and underscores, and not "
                f"as a pooling or an attribute of nn.ModuleDict is, got {name!r}"
            )
    return modules


def _is_pooling(name: str) -> bool:
    try:
        parse_candidate(name)
    except ValueError:
        return False
    return True


def mixed(x: Tensor, weights: Tensor, outs: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Sum of the output of all poolings, if there is one, and the weighted ones of the extras."""
    if has_torch_function((x, weights, *outs)):
        given: Tensor = handle_torch_function(mixed, (x, weights, *outs), x, weights, outs, names)
        return given
    pooled = outs[: len(outs) - len(names)]
    terms = [out.to(weights.dtype) for out in pooled]
    for k, (name, out) in enumerate(zip(names, outs[len(pooled) :], strict=True)):
        if out.shape != x.shape:
            raise RuntimeError(
                f"extra candidate {name!r} should give the shape that it gets, "
                f"{tuple(x.shape)}, got {tuple(out.shape)}"
            )
        terms.append(weights[..., k, None, None] * out.to(weights.dtype))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(x.dtype)
