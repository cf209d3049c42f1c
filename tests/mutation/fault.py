"""What a fault is, and which tests belong to the part of the project that it is planted in."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.rooms import file_of


@dataclass(frozen=True)
class Area:
    """A part of the project: what has to be built again, and the tests that watch over it.

    The tests are those of the part, not of any fault: a fault may be noticed by every one of them.
    """

    tests: tuple[str, ...]
    """Arguments of pytest."""
    builds: str = ""
    """``cpu``, ``cuda`` or ``arm``, see builds.py; nothing for Python."""
    environment: Mapping[str, str] = field(default_factory=dict)


NOT_THE_DEFINITION = ("-k", "not reference")


def _files(*names: str) -> tuple[str, ...]:
    return tuple(map(file_of, names))


KERNEL_TESTS = (
    *_files("op/addresses", "op/backward", "op/streams", "op/forward", "pytorch/opcheck"),
    *_files("op/determinism", "op/sweep", "op/moments"),
    *("-k", "not reference and not instruction_set"),  # one alone is built
)

SHAPES_AND_SETTINGS = (
    *("plain", "one", "row", "two", "narrow", "w17", "c17", "map7", "wide", "planes"),
    *("channels_last", "c17-channels_last", "wide-channels_last", "sliced", "stepped"),
    *("alpha_ck", "alpha_n1k", "alpha_nck", "no_pad_count-raw", "rectangular-no_pad_count-raw"),
    *(
        "with_none-raw",
        "duplicates-raw",
        "no_skip-stride2",
        "w17-rectangular-stride(1, 2)-no_pad_count",
    ),
)
ANY_DATA = (
    "relu6",
    "relu6-largest",
    "nan",
    "nan_inf-max",
    "minus_inf_block",
    "channels_last-relu6",
)
SAMPLE: dict[str, tuple[str, ...]] = {
    "op/test_forward.py::test_output_is_right": SHAPES_AND_SETTINGS,
    "op/test_backward.py::test_gradients_are_right": SHAPES_AND_SETTINGS,
    "op/test_forward.py::test_output_is_right_for_any_data": ANY_DATA,
    "op/test_backward.py::test_gradient_of_x_is_right_for_any_data": ANY_DATA,
    "op/test_backward.py::test_weights_alone_of_maps_cut_out_of_wider_ones": ("5", "7"),
    "op/test_addresses.py::test_x_far_apart": (
        "images-torch.float32",
        "images_of_planes-torch.float32",
    ),
}
"""What a GPU's kernels are asked without a GPU, where each case may take a second: float32 in one
case of every kind."""


STRIPS = ("w16", "tall")
"""Nothing but whole vectors, and several strips of rows in a plane."""

FORMS = tuple(
    f"{case}{form}"
    for form in ("stack", "normalized")
    for case in ("", "w16-", "w17-", "tall-", "planes-", "channels_last-", "pyramid-", "with_none-")
)
"""What the other forms of the op are asked for."""


def _sample(backend: str, *more: str) -> tuple[str, ...]:
    """The names of the tests; ``more`` are cases that this backend is asked for."""
    return tuple(
        f"tests/{test}[{backend}-{case}]"
        for test, some in SAMPLE.items()
        for case in ((*some, *more) if some is SHAPES_AND_SETTINGS else some)
    )


CUDA = (
    "op/test_moments.py::test_moments[cuda-torch.float32-parts-contiguous-any]",
    "op/test_moments.py::test_fields[cuda-primes-channels-padding counts-contiguous-squares]",
    "op/test_moments.py::test_poolings_do_not_matter_without_a_slope[cuda-any-1]",
    "op/test_backward.py::test_gradients_are_right[cuda-wide-normalized]",
    *(
        f"op/test_backward.py::test_gradients_are_right[cuda-{case}bfloat16]"
        for case in ("", "w16-", "tall-", "wide-")
    ),
    *(
        f"op/test_backward.py::test_gradient_of_x_is_right_for_any_data[cuda-bfloat16-{data}]"
        for data in ("relu6", "relu6-max", "signed_zero-max", "nan", "minus_inf_block-max")
    ),
)
"""Sums of several parts of a plane, fields of any terms, and maxima by keys."""


def _cuda(order: str) -> Area:
    """The CUDA kernels on the CPU: which thread comes first decides what a missing barrier does."""
    more = (f"tests/{test}" for test in CUDA)
    tests = (*_sample("cuda", *STRIPS, *FORMS), *more)
    return Area(tests, "cuda", {"METAPOOL_HOST_ORDER": order})


TRITON_FORMS = (
    "op/test_forward.py::test_output_is_right[triton-unsorted-stack]",
    "op/test_forward.py::test_output_is_right[triton-c17-channels_last-unsorted-stack]",
    "op/test_forward.py::test_output_is_right[triton-unsorted-no_pad_count-stack]",
    "op/test_moments.py::test_moments[triton-torch.float32-tall-contiguous-any]",
    "op/test_moments.py::test_moments[triton-torch.float32-c17-channels_last-any]",
    "op/test_moments.py::test_moments[triton-torch.float32-primes-channels_last-any]",
    "op/test_moments.py::test_constants_of_planes[triton-images-sliced]",
    "op/test_backward.py::test_gradients_are_right[triton-unsorted-stack]",
    "op/test_backward.py::test_gradients_are_right[triton-w17-stack]",
    "op/test_backward.py::test_gradients_are_right[triton-no_skip-stride2-stack]",
    "op/test_backward.py::test_gradients_are_right[triton-no_pad_count-stack]",
    "op/test_backward.py::test_gradients_are_right[triton-normalized]",
    "op/test_backward.py::test_gradients_are_right[triton-w17-normalized]",
    "op/test_backward.py::test_gradients_are_right[triton-no_pad_count-raw-normalized]",
    "op/test_backward.py::test_gradients_are_right[triton-avg-normalized]",
    "op/test_normalized.py::test_one_channel_that_is_not_finite[triton-middle-inf]",
    "op/test_normalized.py::test_one_channel_that_is_not_finite[triton-middle-nan]",
    "op/test_backward.py::test_gradients_are_right[triton-no_skip-stride2-normalized]",
    "op/test_backward.py::test_gradients_are_right[triton-float64-stack]",
    "op/test_moments.py::test_poolings_do_not_matter_without_a_slope[triton-any-1]",
    "op/test_moments.py::test_fields[triton-primes-channels-padding counts-contiguous-squares]",
    "op/test_moments.py::test_fields[triton-primes-images-it does not-channels_last-squares]",
    "triton/test_configs.py::test_configuration_of_sums[triton-high, odd-0]",
    "triton/test_configs.py::test_configuration_of_sums[triton-high, odd-2]",
    "triton/test_configs.py::test_configuration_of_sums[triton-low, channels_last-0]",
)
"""What it does but mix."""


AREAS: dict[str, Area] = {
    "CPU kernels": Area(KERNEL_TESTS, builds="cpu"),
    "CPU dispatch": Area(KERNEL_TESTS, builds="cpu"),
    "ARM": Area(("tests/arm",), builds="arm"),
    "bindings": Area(
        (*_files("pytorch/opcheck", "op/layout", "op/backward"), *NOT_THE_DEFINITION), builds="cpu"
    ),
    "CUDA kernels": _cuda("forward"),
    "CUDA kernels, threads reversed": _cuda("reversed"),
    "Triton kernels": Area(_sample("triton"), environment={"TRITON_INTERPRET": "1"}),
    "Triton forms": Area(
        tuple(f"tests/{test}" for test in TRITON_FORMS),
        environment={"TRITON_INTERPRET": "1"},
    ),
    "autograd": Area((*_files("op/double_backward", "pytorch/func"), *NOT_THE_DEFINITION)),
    "ops": Area(_files("pytorch/opcheck", "op/layout")),
    "dispatch": Area(
        (*_files("refusals/bad_input", "packaging/build"), "-k", "not the_build_is_written_down")
    ),
    "checks": Area((*_files("op/candidates", "refusals/bad_input"), *NOT_THE_DEFINITION)),
    "definition": Area(_files("op/forward", "op/layout", "modules/modules")),
    "modules": Area(_files("modules/modules", "modules/extra_candidates")),
    "normalised": Area(
        (*_files("op/normalized", "op/moments", "pytorch/distributed"), *NOT_THE_DEFINITION)
    ),
    "plain": Area(_files("modules/plain")),
    "stopping rule": Area(_files("search/stopping", "search/perturbation")),
    "bilevel step": Area(
        _files("search/bilevel", "search/steps", "search/stateless", "search/perturbation")
    ),
    "loops of others": Area(_files("search/pooling_search")),
    "cost": Area(
        (
            *_files("search/front", "search/cost_table", "search/expected_cost"),
            *("-m", "not costly", "-k", "not (not_work or not_there or not_compare or drawn)"),
        )
    ),
}
"""By name, in the order in which they are run: what takes longest comes first."""


@dataclass(frozen=True)
class Fault:
    """Text that stands once in a file, and what takes its place.

    A fault with a reason for being ``equivalent`` changes nothing that a test could see.
    """

    name: str
    area: str
    path: str
    right: str
    wrong: str
    equivalent: str = ""
