"""The list of what is checked: each row says what is shown, by which command, and where it runs."""

from dataclasses import dataclass, field

from metapool_kernels.devices.registry import NAMES, extra
from tests.compatibility import plans
from tests.rooms import file_of


@dataclass(frozen=True)
class Check:
    """A row of the page."""

    what: str
    files: tuple[str, ...] = ()
    """Files of tests that `make test-all` runs; their counts are taken from its reports."""
    target: str = ""
    """Another target of the Makefile, and the results that it leaves under build/checked."""
    results: tuple[str, ...] = ()
    in_ci: bool = True

    @property
    def command(self) -> str:
        """What to type; files of tests run in an environment that `make install` made."""
        return f"make {self.target}" if self.target else f"pytest {' '.join(self.files)}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the results that the row shows; of files of tests, their sum."""
        if self.files:
            search = self.files[0].startswith("tests/search")
            return ("test", "test-rest-search" if search else "test-rest-op")
        return self.results


@dataclass(frozen=True)
class Section:
    """Rows that belong together, with a few words on them."""

    title: str
    about: str
    checks: tuple[Check, ...] = field(default=())


def _tests(what: str, *names: str) -> Check:
    return Check(what, tuple(map(file_of, names)))


def _target(what: str, target: str, *results: str, in_ci: bool = True) -> Check:
    return Check(what, target=target, results=results or (target,), in_ci=in_ci)


SECTIONS = (
    Section(
        "Right numbers",
        "The truth is the definition in plain PyTorch and float64. An error may not exceed that of "
        "eager PyTorch in the same dtype; NaN and infinities stand where the truth has them; what "
        "nobody wrote would show as NaN.",
        (
            _tests("the whole suite judges itself: wrong kernels fail it", "house/judge"),
            _tests("values", "op/forward"),
            _tests("gradients, ties and NaN in them", "op/backward"),
            _tests("second order", "op/double_backward"),
            _tests("every width and number of planes from 1 to 70", "op/sweep", "op/streams"),
            _tests("strides are PyTorch's, with and without memory", "op/layout"),
            _tests("arrays: the NumPy entry points", "op/numpy"),
            _tests("poolings side by side, as in SPPF, against PyTorch's", "op/multi_pool"),
            _tests(
                "poolings normalised before they are mixed, against DARTS' own", "op/normalized"
            ),
            _tests("what that takes by itself: moments, products, constants", "op/moments"),
            _tests(
                "names, modules", "op/candidates", "modules/modules", "modules/extra_candidates"
            ),
        ),
    ),
    Section(
        "A suite that nobody here wrote",
        "PyTorch's own sample and error inputs of its two poolings, with the number that are "
        "driven and the reasons for the others; and PyTorch's generic checks of an operator, on an "
        "OpInfo of ours.",
        (
            _tests(
                "samples, errors, dtypes of `avg_pool2d` and `max_pool2d`",
                "pytorch/pytorch_samples",
            ),
            _tests(
                "dtypes, errors, strides, lazy negation and copies, subclasses, tracing, gradients "
                "of first and second order, forward and batched",
                "pytorch/opinfo",
            ),
            _tests("`torch.library.opcheck` of every op, layout and dtype", "pytorch/opcheck"),
        ),
    ),
    Section(
        "Fuzzing",
        "Shapes, strides, offsets, layouts, candidates, weights; ties, NaN, infinities, denormal "
        "numbers and numbers near overflow. Witnesses: the backend, PyTorch in float64, arrays "
        "(to the bit) and a definition in NumPy that shares no line with either. Counts are of "
        "calls whose first derivatives are judged, + those of second order and of witnesses.",
        (
            _tests("500 calls and more of each backend", "op/fuzz"),
            _target(
                "20,000 calls of each backend from fresh seeds",
                "fuzz",
                *(f"fuzz-{name}" for name in ("cpu", "reference", "cuda", "triton")),
                in_ci=False,
            ),
        ),
    ),
    Section(
        "Memory",
        "Sanitizers watch the compiled code; planted faults show that they would speak.",
        (
            _target("AddressSanitizer and UBSan, CPU kernels", "test-sanitized"),
            _target(
                "AddressSanitizer and UBSan, CUDA kernels run on the CPU",
                "test-cuda-host-sanitized",
            ),
            _target("ThreadSanitizer, the CPU kernels on threads of its own", "test-threads"),
            _tests("what a call keeps; 10,000 calls leak nothing", "op/memory"),
            _tests("elements that lie more than 2**31 apart", "op/addresses"),
            _target("maps of more than 2**31 elements and 2**32 bytes", "test-large", in_ci=False),
        ),
    ),
    Section(
        "Threads and processes",
        "",
        (
            _tests(
                "the same bits for 1, 2, 3 and 7 threads and every instruction set",
                "op/determinism",
            ),
            _tests(
                "eight threads at once, workers, fork, spawn, number of threads",
                "pytorch/processes",
            ),
            _tests(
                "eight threads of arrays; Python's lock stays off where it can",
                "packaging/free_threaded",
            ),
            _tests("DDP and FSDP over two processes", "pytorch/distributed"),
            _target(
                "the kernels under each instruction set",
                "test-isas",
                "test-isas-baseline",
                "test-isas-avx2",
            ),
            _target(
                "6048 calls on an emulated AArch64, to the bit what each instruction set of this "
                "machine gives",
                "test-arm",
            ),
        ),
    ),
    Section(
        "Compilers and transforms",
        "",
        (
            _tests("`torch.compile`: one graph, shapes without recompiling", "pytorch/compile"),
            _tests("`torch.export`, AOTInductor", "pytorch/export"),
            _tests("plain `torch.nn` forms of poolings and mixtures", "modules/plain"),
            Check(
                "what carries networks to the runtimes of devices",
                ("tests/devices/test_carrying.py",),
            ),
            _tests("`torch.func`, composed", "pytorch/func"),
            _tests("the page on other frameworks: PyTorch's row, what to set", "house/frameworks"),
            _tests(
                "autocast, parametrizations, meta device, copies, second derivatives",
                "pytorch/autocast",
                "pytorch/torch_tools",
            ),
        ),
    ),
    Section(
        "Compatibility",
        "One binary, built once, is installed beside other versions; its hash is compared before "
        "and after.",
        (
            _tests(
                "which symbols the libraries ask for and show; where AVX is", "packaging/binaries"
            ),
            _tests(
                "how it is built, what is said where it cannot be",
                "packaging/build",
                "packaging/build_cuda",
                "packaging/compatibility",
            ),
            _target(
                "an older torch, no compiler",
                "test-older",
                "test-older-torch-2.13.0",
                "test-older-sdist-no-compiler",
            ),
            _target(
                "torch 2.10 to the newest, Python 3.10 to 3.13, wheel and source distribution, "
                "without compiler, Triton or NumPy; the lowest version that is allowed of every "
                "package, the search's too",
                "test-compatibility",
                *(f"compatibility-{plan.name}" for plan in plans.everything(())),
                in_ci=False,
            ),
            _target(
                "a manylinux wheel, which auditwheel accepts as it is, under torch 2.13.0",
                "wheel",
                "wheel-torch-2.13.0",
                in_ci=False,
            ),
            _target(
                "one for AArch64, compiled here, in an emulated Python under torch 2.10.0",
                "wheel-arm",
                in_ci=False,
            ),
            _target("what an import takes", "bench-import", "import-time", in_ci=False),
        ),
    ),
    Section(
        "Bad input",
        "Class and message of every refusal, and that nothing changed.",
        (
            _tests(
                "every row of the contract on every backend, recorded and compiled",
                "refusals/bad_input",
                "refusals/bad_calls",
            ),
            _tests("arrays", "refusals/numpy_bad_input"),
            _tests("lazy, nested, quantized and subclassed tensors", "refusals/odd_tensors"),
        ),
    ),
    Section(
        "GPU code without a GPU",
        "",
        (
            _target("Triton's kernels in its interpreter (a share)", "test-interpreter"),
            _target(
                "the CUDA kernels on the CPU, threads in three orders",
                "test-cuda-host",
                "test-cuda-host-forward",
                "test-cuda-host-reversed",
                "test-cuda-host-random",
            ),
            _tests("missing barriers and writes astray show on the CPU too", "cuda/cuda_host"),
            _tests(
                "machine code: spills, atomics, NaN, loads, registers",
                "triton/machine_code",
                "cuda/cuda_code",
            ),
            _tests(
                "machine code for AMD's gfx942 and gfx950: spills, NaN, waves", "triton/amd_code"
            ),
            _target(
                "machine code for sm_80 and sm_100, and a search with the settings for ImageNet",
                "test-slow",
                in_ci=False,
            ),
            _tests("what a GPU shows, where there is one", "cuda/on_gpu"),
            _tests("ten minutes on a GPU, on a machine that lies", "house/gpu_check"),
            _tests("Triton's kernels compiled before they are needed", "triton/ahead"),
        ),
    ),
    Section(
        "The search, and everything around",
        "",
        (
            Check("mathematics, stopping, resume, processes, files, export", ("tests/search",)),
            Check(
                "PoolingSearch in loops of others: classification, segmentation, detection; "
                "against `torch.func`, after breaks, in two processes, compiled, checkpointed",
                ("tests/search/test_pooling_search.py",),
            ),
            _tests(
                "benchmarks, presets, and the arrows between the parts",
                "house/benches",
                "triton/configs",
                "house/architecture",
            ),
            _tests(
                "which tests `make test` runs, and figures that belong to one version of a "
                "compiler or of PyTorch",
                "house/selection",
                "house/recorded",
            ),
            _target(
                "exported networks in the real runtimes of devices: every pooling, strides, "
                "mixtures, attention, a MobileNetV2, odd images",
                "test-devices",
                *dict.fromkeys(f"test-devices-{extra(name)}" for name in NAMES),
            ),
            _target(
                "PoolingSearch as a callback of the real Lightning and of the real Trainer of "
                "Hugging Face; runs that are stopped and go on",
                "test-callbacks",
                in_ci=False,
            ),
            Check("this page", ("tests/checked",)),
        ),
    ),
    Section(
        "What others have reported",
        "Public reports of other projects for this kind of work, on kernels, architecture search, "
        "surgery on networks, image folders and command lines, were tried here by analogy: some "
        "seventy. What failed was mended with its kind, which has tests.",
        (
            Check(
                "the precision and the wrapping of a run after every change of the network; exact "
                "resume under every optimizer",
                ("tests/search/test_resume.py",),
            ),
            Check(
                "settings that win wherever they stand, names that stand twice, paths, limits",
                ("tests/search/test_cli.py", "tests/search/test_run_folder.py"),
            ),
            Check(
                "what runs again in backward; a first step of each level before anything is "
                "written",
                ("tests/search/test_stateless.py", "tests/search/test_first_step.py"),
            ),
            Check(
                "a look at all images before anything is trained",
                ("tests/search/test_inspection.py",),
            ),
            Check("Ctrl-C, pipes that close, notebooks", ("tests/search/test_leaving.py",)),
            Check(
                "places that a network passes by; subclasses, hooks",
                ("tests/search/test_surgery.py",),
            ),
        ),
    ),
    Section(
        "Do the tests notice?",
        "Faults are planted one at a time in kernels, bindings, dispatch, autograd, checks, the "
        "stopping rule and the bilevel step, and the fast tests run.",
        (
            _tests("every fault still fits the sources", "house/mutation"),
            _target("the faults", "mutate", "mutation", in_ci=False),
        ),
    ),
)
"""The page, from top to bottom."""
