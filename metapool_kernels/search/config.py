"""The settings, as dataclasses. The YAML file and the command line both fill these.

Defaults are those of the author's experiments on CIFAR-10 where they are known, ours elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from metapool_kernels import DEFAULT_CANDIDATES
from metapool_kernels.search.errors import UserError


@dataclass
class DataConfig:
    """Which images.

    Args:
        kind: ``digits`` (scikit-learn's 1797 handwritten digits) or ``folder`` (a folder with
            ``train/`` and ``val/``, each with one subfolder per class).
        root: the folder, for ``folder``.
        image_size: side of the square that every image is resized to, in pixels.
        batch_size: images per step.
        holdout: share of the digits kept for evaluation; a folder has ``val/`` for that.
        workers: processes that load images.
    """

    kind: Literal["digits", "folder"] = "digits"
    root: str | None = None
    image_size: PositiveInt = 32
    batch_size: PositiveInt = 64
    holdout: OpenUnitInterval = 0.2
    workers: NonNegativeInt = 0


@dataclass
class ModelConfig:
    """Which network, and where the enhancers go.

    Args:
        name: a timm model.
        arguments: more arguments for ``timm.create_model``.
        keep_dilation: False sets every dilation to 1. timm's ``output_stride`` trades strides for
            dilations; on maps no wider than the dilation those convolutions see padding alone.
        insert_after: regular expression; every module whose whole name matches is followed by an
            enhancer.
        candidates: the poolings to choose from, see ``metapool_kernels.fused_meta_pool``.
        count_include_pad: whether the padding counts in the divisor of an average.
    """

    name: str = "mobilenetv2_100"
    arguments: dict[str, Any] = field(default_factory=dict)
    keep_dilation: bool = True
    insert_after: str = r"blocks\.[1-6]\.\d+\.bn2"
    candidates: list[str] = field(default_factory=lambda: list(DEFAULT_CANDIDATES))
    count_include_pad: bool = True


@dataclass
class WeightConfig:
    """How weights are trained: SGD, cosine schedule.

    Args:
        lr: learning rate of the first step; it falls to 0 along a cosine.
        momentum: momentum of SGD.
        weight_decay: L2 penalty on the weights.
        clip: largest norm of the gradient of all weights together.
    """

    lr: PositiveFloat = 0.025
    momentum: ClosedUnitInterval = 0.9
    weight_decay: NonNegativeFloat = 3e-4
    clip: PositiveFloat = 5.0


@dataclass
class AlphaConfig:
    """How architecture parameters are trained: Adam.

    Args:
        lr: learning rate.
        betas: Adam's two decay rates.
        weight_decay: L2 penalty on alpha.
    """

    lr: PositiveFloat = 3e-4
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.5, 0.999)
    weight_decay: NonNegativeFloat = 1e-3


@dataclass
class StopConfig:
    """When a layer's choice is fixed.

    Args:
        delta: lead of the largest probability over the second that fixes a layer.
        patience: how many checks in a row, one per epoch, must find the same candidate so far
            ahead.
        ema: decay of the moving average of the probabilities, per alpha step.
        deadline: share of the epochs after which layers still open keep their best two.
    """

    delta: OpenUnitInterval = 0.2
    patience: PositiveInt = 2
    ema: ClosedUnitInterval = 0.9
    deadline: ClosedUnitInterval = 2 / 3


@dataclass
class SearchConfig:
    """The search.

    Args:
        epochs: passes over the weight half; the search ends earlier if every layer has stopped.
        warmup: share of the epochs, at the start, that train weights only.
        alpha_half: share of the training images that trains alpha and never the weights.
        weights: the lower level.
        alpha: the upper level.
        stop: the stopping rule.
    """

    epochs: PositiveInt = 100
    warmup: ClosedUnitInterval = 0.1
    alpha_half: OpenUnitInterval = 0.5
    weights: WeightConfig = field(default_factory=WeightConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    stop: StopConfig = field(default_factory=StopConfig)


@dataclass
class AdaptConfig:
    """Training of the derived network, and of the same one without enhancers.

    Args:
        epochs: passes over all training images.
        start: ``scratch``, or ``searched`` to begin with the supernet's weights. The network
            without enhancers always begins from scratch.
        weights: how.
    """

    epochs: PositiveInt = 100
    start: Literal["scratch", "searched"] = "scratch"
    weights: WeightConfig = field(default_factory=WeightConfig)


@dataclass
class Config:
    """Everything a run needs.

    Args:
        output: the run folder.
        seed: of the split, the initial weights and the order of the images.
        threads: of each operation on the CPU; null is one for each core. Sums, and so all that
            follows, depend on it in the last digits.
        data: which images.
        model: which network.
        search: the search.
        adapt: the training after it.
    """

    output: str
    seed: NonNegativeInt = 0
    threads: PositiveInt | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)


def config_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """A parser of all settings; ``options`` are those of ``jsonargparse.ArgumentParser``."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    parser.add_class_arguments(Config)
    return parser


def to_config(settings: jsonargparse.Namespace) -> Config:
    """What a parser has instantiated, as one object of plain numbers."""
    return Config(**{item.name: _plain(settings[item.name]) for item in fields(Config)})


def _plain(value: Any) -> Any:
    """``value`` without jsonargparse's own number types, which checkpoints could not hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, float) else value


def to_yaml(config: Config) -> str:
    """All settings as YAML."""
    parser = config_parser()
    text: str = parser.dump(parser.parse_object(asdict(config)))
    return text


def load_config(path: Path) -> Config:
    """Read what :func:`to_yaml` has written.

    Raises:
        UserError: the file is not there or is no such file.
    """
    parser = config_parser()
    try:
        return to_config(parser.instantiate(parser.parse_path(str(path))))
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        raise UserError(f"{str(path)!r} holds no settings of metapool search: {error}") from error


def differences(old: Config, new: Config, sections: tuple[str, ...]) -> list[str]:
    """What has changed between two configurations in some of their fields, in words."""
    before, after = (dict(_leaves(asdict(config), "")) for config in (old, new))
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before | after)
        if name.split(".")[0] in sections and before.get(name) != after.get(name)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
