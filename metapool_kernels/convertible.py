"""What turns modules of ours into plain ones of ``torch.nn``, in whatever network they stand."""

from collections.abc import Sequence
from copy import copy
from inspect import signature

from torch import nn

from metapool_kernels.candidates import parse_candidate
from metapool_kernels.plain import FORM, Form, plain_pool


class Convertible(nn.Module):
    """A module that can become plain ones which compute the same.

    A subclass with a forward of its own needs a ``to_torch`` to go with it.
    """

    def to_torch(self, form: Form = FORM) -> nn.Module:
        """Plain modules, whose poolings are written as ``form`` says."""
        raise NotImplementedError

    def _inner(self) -> nn.Module | None:
        """A part whose plain form is a part of this one's."""
        return None

    def _check_plain_form(self) -> None:
        if not has_plain_form(self):
            raise NotImplementedError(
                f"{type(self).__name__} has a forward of its own, or a pooling that has one; give "
                "its class a to_torch that goes with it"
            )

    def _with_hooks(self, *plain: nn.Module) -> nn.Module:
        """Plain modules one after the other, with the hooks of this one."""
        hooked = any(getattr(self, name) for name in _HOOKS)
        if len(plain) == 1 and not hooked:
            return plain[0]
        sequence = nn.Sequential(*plain)
        for name in (*_HOOKS, *_HOOK_OPTIONS):
            setattr(sequence, name, copy(getattr(self, name)))
        return sequence


# As nn.Module has them. What a hook changes is a part of what a module computes.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def plain_pools(
    candidates: Sequence[str], stride: tuple[int, int], count_include_pad: bool, form: Form
) -> list[nn.Module]:
    """A plain module for each candidate."""
    return [
        plain_pool(parse_candidate(name), stride, count_include_pad, form) for name in candidates
    ]


def has_plain_form(module: nn.Module) -> bool:
    """Whether ``module`` has a ``to_torch`` that knows what it computes."""
    if not isinstance(module, Convertible):
        return False
    for kind in type(module).__mro__:
        if {"forward", "to_torch"} & vars(kind).keys():
            known = "to_torch" in vars(kind) and "forward" not in vars(module)
            inner = module._inner()
            return known and (inner is None or has_plain_form(inner))
    return False


def plain_form(module: Convertible, form: Form) -> nn.Module:
    """Its ``to_torch``; one that a subclass has brought along need not know forms."""
    knows = "form" in signature(module.to_torch).parameters
    return module.to_torch(form) if knows else module.to_torch()


def to_plain(model: nn.Module, form: Form = FORM) -> nn.Module:
    """Turn every enhancer, mixture and poolings side by side into plain modules, in place.

    Poolings are written as ``form`` says.

    One of a subclass with a forward of its own stays what it is, an enhancer with a plain pooling
    inside, unless its class has a ``to_torch`` too.

    Returns:
        ``model``, or what it has become if it is one of these itself.
    """
    replaced: tuple[str, ...] = ()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name.startswith(replaced) or not isinstance(module, Convertible):
            continue
        if not has_plain_form(module):
            continue
        plain = plain_form(module, form)
        plain.training = module.training
        for part_name, part in plain.named_children():  # candidates may be networks of their own
            plain.set_submodule(part_name, to_plain(part, form))
        if not name:
            return plain
        model.set_submodule(name, plain)
        replaced += (f"{name}.",)
    return model
