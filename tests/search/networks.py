"""Networks of a user's own that do something out of the ordinary, for ``model.name``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metapool_kernels.search.networks.shallow import shallow_net


def shallow_with_dropout(num_classes: int, in_chans: int, width: int) -> nn.Module:
    """What it drops must be the same in a run that goes on."""
    network = shallow_net(num_classes, in_chans, width)
    network.head = nn.Sequential(nn.Dropout(0.2), network.head)
    return network


class Small(nn.Module):
    """Two convolutions, whose maps enhancers may follow, and a classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.GELU())
        self.mid = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, num_classes)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(self.stem(x))
        return out

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class StemAgain(Small):
    """Runs its first part again in backward."""

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(checkpoint(self.stem, x, use_reentrant=False))
        return out


class AllAgain(Small):
    """Runs all of its maps again in backward, enhancers among them, and the first part twice."""

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.parts, x, use_reentrant=False)
        return out

    def parts(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(checkpoint(self.stem, x, use_reentrant=False))
        return out


class Reentrant(Small):
    """By the older kind of checkpointing, which torch.autograd.grad passes over."""

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(checkpoint(self.stem, x.requires_grad_(), use_reentrant=True))
        return out


class Box:
    """What holds something, and is neither a module nor a container of Python's own."""

    def __init__(self, content: nn.Module) -> None:
        self.content = content


class Held(Small):
    """Finds its first part by a way that is not followed."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        self.box = Box(self.stem)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(self.box.content(x))
        return out


class Referring(Small):
    """Refers to its parts by all ways that can be followed."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        self.more = nn.Conv2d(6, 6, 1)
        self.ways = {"first": [self.stem], "second": (partial(self.call, self.more),)}
        self.scale = [self.head.bias]
        self.shift = Tensor()
        self.stem[2].register_forward_hook(self.note)

    def note(self, module: nn.Module, args: object, out: Tensor) -> None:
        self.shift = out.mean()

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = module(x)
        return out

    def features(self, x: Tensor) -> Tensor:
        maps = self.mid(self.ways["second"][0](self.ways["first"][0](x)))
        return maps * self.scale[0].square().sum() + self.shift


class Recurrent(Small):
    """Its cell keeps a list of all its weights beside the parameters."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        self.cell = nn.GRU(6, 6, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        maps = super().features(x)
        rows, _ = self.cell(maps.flatten(2).transpose(1, 2))
        return rows.transpose(1, 2).reshape(maps.shape)


class Unsteady(Small):
    """Computes something else each time, whatever is seeded."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        self.calls = [0]

    def features(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return super().features(x) * (1 + self.calls[0] % 3)


class Several(Small):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return (out, out) if self.training else out


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("there is no such gradient")


class NoBackward(Small):
    def features(self, x: Tensor) -> Tensor:
        out: Tensor = Fails.apply(super().features(x))  # type: ignore[no-untyped-call]
        return out


class NotANumber(Small):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) / (0.0 if self.training else 1.0)


class Softmax(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).softmax(1)


class LogSoftmax(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).log_softmax(1)


def _weight_norm(num_classes: int, in_chans: int) -> nn.Module:
    network = Small(num_classes, in_chans)
    nn.utils.parametrizations.weight_norm(network.mid)
    return network


def _older_weight_norm(num_classes: int, in_chans: int) -> nn.Module:
    network = Small(num_classes, in_chans)
    nn.utils.weight_norm(network.mid)
    return network


def _lazy(num_classes: int, in_chans: int) -> nn.Module:
    network = Small(num_classes, in_chans)
    network.mid = nn.LazyConv2d(6, 1)
    return network


def _tied(num_classes: int, in_chans: int) -> nn.Module:
    network = Small(num_classes, in_chans)
    second = nn.Conv2d(6, 6, 1)
    second.weight = network.mid.weight
    network.stem.append(second)
    return network


def _compiled(num_classes: int, in_chans: int) -> nn.Module:
    network = Small(num_classes, in_chans)
    network.stem = torch.compile(network.stem, backend="eager")  # type: ignore[assignment]
    network.mid.compile(backend="eager")
    return network


def _traced(num_classes: int, in_chans: int) -> nn.Module:
    return torch.fx.symbolic_trace(Small(num_classes, in_chans))


def _patched(num_classes: int, in_chans: int) -> nn.Module:
    """As preprocessing is put before a network; with a function that could call itself."""
    network = Small(num_classes, in_chans)
    network.features = partial(Small.features, network)  # type: ignore[method-assign]
    forward, bias = network.forward, network.head.bias

    def prepared(x: Tensor, times: int = 2, *, shift: Tensor = bias) -> Tensor:
        if times:
            return prepared(x + shift.mean(), times - 1)
        out: Tensor = forward(x)
        return out

    network.forward = prepared  # type: ignore[method-assign]
    return network


def scripted(num_classes: int, in_chans: int) -> nn.Module:
    """Its first part is compiled by TorchScript."""
    network = Small(num_classes, in_chans)
    network.stem = torch.jit.script(network.stem)
    return network


FOLLOWED: dict[str, Callable[[int, int], nn.Module]] = {
    "ordinary": Small,
    "stem recomputed": StemAgain,
    "all recomputed": AllAgain,
    "containers, methods, hooks": Referring,
    "recurrent": Recurrent,
    "weight norm": _weight_norm,
    "older weight norm": _older_weight_norm,
    "lazy": _lazy,
    "tied": _tied,
    "compiled": _compiled,
    "traced by fx": _traced,
    "patched": _patched,
}
"""Those in which the tensors that are put in count everywhere."""


def saving(num_classes: int, in_chans: int) -> nn.Module:
    """timm's own gradient checkpointing."""
    model: nn.Module = timm.create_model(
        "mobilenetv2_035", num_classes=num_classes, in_chans=in_chans, output_stride=4
    )
    model.set_grad_checkpointing(True)
    return model


def few_classes(num_classes: int, in_chans: int) -> nn.Module:
    """With fewer outputs than there are classes."""
    return Small(3, in_chans)


held, reentrant, unsteady, several = Held, Reentrant, Unsteady, Several
no_backward, not_a_number, recomputed = NoBackward, NotANumber, AllAgain
ordinary, softmax, log_softmax = Small, Softmax, LogSoftmax
"""As ``model.name`` asks for them."""
