"""A network that computes with other tensors than its own."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_COMPILED = "_compiled_call_impl"
"""What :meth:`torch.nn.Module.compile` leaves, which is bound to the module itself."""


class Stateless:
    """Makes networks of the structure of one, with other tensors wherever some of its own stand.

    Unlike under :func:`torch.func.functional_call` the tensors stay where they have been put: what
    runs again in backward, as in gradient checkpointing, finds them too. Structure is copied and no
    tensor; what such a network notes in its attributes while it runs is gone with it.

    References to modules and tensors are followed into containers, bound methods, partial functions
    and closures, not into other objects. Of what is compiled that is taken which was compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        own = [*self._modules, *model.parameters(), *model.buffers()]
        anything = dict.fromkeys(map(id, own), object())
        # All else is shared by every copy, which makes these fast.
        self._referring = [
            [
                name
                for name, value in vars(module).items()
                if name != _COMPILED and _follow(value, anything) is not value
            ]
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
            attributes[_COMPILED] = None
            for name in referring:
                attributes[name] = _follow(attributes[name], copies)
        copy: nn.Module = copies[id(self.model)]
        return copy


def _follow(value: Any, copies: Mapping[int, Any], within: tuple[int, ...] = ()) -> Any:
    """``value`` with copies in the place of what they are copies of; itself if there are none."""
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    if kind not in _PARTS or id(value) in within:
        return value
    take_apart, put_together = _PARTS[kind]
    parts = take_apart(value)
    within = (*within, id(value))
    followed = [_follow(part, copies, within) for part in parts]
    same = all(a is b for a, b in zip(parts, followed, strict=True))
    return value if same else put_together(value, followed)


def _parts_of_function(function: FunctionType) -> list[Any]:
    return [*_contents(function), function.__defaults__, function.__kwdefaults__]


def _contents(function: FunctionType) -> list[Any]:
    """Of its closure; a variable that is not bound yet stands for itself."""
    cells = function.__closure__ or ()
    return [cell if cell == CellType() else cell.cell_contents for cell in cells]


def _function_of(function: FunctionType, parts: list[Any]) -> FunctionType:
    *contents, defaults, keyword_defaults = parts
    cells = tuple(c if isinstance(c, CellType) else CellType(c) for c in contents)
    name = function.__name__
    made = FunctionType(function.__code__, function.__globals__, name, defaults, cells)
    made.__kwdefaults__ = keyword_defaults
    for cell, content in zip(cells, contents, strict=True):
        if content is function:  # it calls itself
            cell.cell_contents = made
    return made


_PARTS: dict[type, tuple[Callable[[Any], Sequence[Any]], Callable[[Any, list[Any]], Any]]] = {
    dict: (lambda d: list(d.values()), lambda d, parts: dict(zip(d, parts, strict=True))),
    OrderedDict: (
        lambda d: list(d.values()),
        lambda d, parts: OrderedDict(zip(d, parts, strict=True)),
    ),
    list: (lambda items: items, lambda items, parts: parts),
    tuple: (lambda items: items, lambda items, parts: tuple(parts)),
    MethodType: (
        lambda method: [method.__func__, method.__self__],
        lambda method, parts: MethodType(*parts),
    ),
    partial: (
        lambda call: [call.func, call.args, call.keywords],
        lambda call, parts: partial(parts[0], *parts[1], **parts[2]),
    ),
    FunctionType: (_parts_of_function, _function_of),
}
"""How what may refer to modules is taken apart and put together again."""
