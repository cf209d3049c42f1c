"""A network that computes with other tensors than its own."""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class Stateless:
    """Makes networks of the structure of one, with other tensors wherever some of its own stand.

    Unlike under :func:`torch.func.functional_call` the tensors stay where they have been put: what
    runs again in backward, as in gradient checkpointing, finds them too. Structure is copied and no
    tensor; what such a network notes in its attributes while it runs is gone with it.

    References to modules and tensors are followed into containers, bound methods and partial
    functions. Closures are not, so of a compiled network that is taken which was compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        own = [*self._modules, *model.parameters(), *model.buffers()]
        anything = dict.fromkeys(map(id, own), object())
        # All else is shared by every copy, which makes these fast.
        self._referring = [
            [name for name, value in vars(module).items() if _follow(value, anything) is not value]
            for module in self._modules
        ]

    def with_tensors(self, put: Mapping[int, Tensor]) -> nn.Module:
        """The network; ``put`` has tensors by the :func:`id` of that whose place they take."""
        copies: dict[int, Any] = dict(put)
        for module in self._modules:
            copies[id(module)] = object.__new__(type(module))
        for module in self._modules:
            compiled = module._modules.get("_orig_mod")
            if compiled is not None:
                copies[id(module)] = copies[id(compiled)]
        for module, referring in zip(self._modules, self._referring, strict=True):
            if "_orig_mod" in module._modules:
                continue
            attributes = vars(copies[id(module)])
            attributes.update(vars(module))
            attributes.pop("_compiled_call_impl", None)
            for name in referring:
                attributes[name] = _follow(attributes[name], copies)
        copy: nn.Module = copies[id(self.model)]
        return copy


def _follow(value: Any, copies: Mapping[int, Any]) -> Any:
    """``value`` with copies in the place of what they are copies of; itself if there are none."""
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    if kind in (dict, OrderedDict):
        followed = kind((key, _follow(item, copies)) for key, item in value.items())
        return followed if _differ(value.values(), followed.values()) else value
    if kind in (list, tuple):
        followed = kind(_follow(item, copies) for item in value)
        return followed if _differ(value, followed) else value
    if kind is MethodType:
        owner = _follow(value.__self__, copies)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if kind is partial:
        parts = value.func, value.args, value.keywords
        function, arguments, keywords = (_follow(part, copies) for part in parts)
        same = not _differ(parts, (function, arguments, keywords))
        return value if same else partial(function, *arguments, **keywords)
    return value


def _differ(one: Any, other: Any) -> bool:
    return any(a is not b for a, b in zip(one, other, strict=True))
