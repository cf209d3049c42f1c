"""The trained network as files that run without this package."""

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import load_architecture
from metapool_kernels.search.config import Config
from metapool_kernels.search.controls import load_network
from metapool_kernels.search.derive import to_plain
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.run_folder import SEARCHED, RunFolder

PROGRAM = "network.pt2"
ONNX = "network.onnx"
INPUT = "images"
OUTPUT = "logits"

TOLERANCE = 1e-4
"""Largest difference that is let through, as a share of the largest output (at least 1)."""

_BATCHES = (1, 5)
"""Batch sizes that the files are checked with; they are made with another one."""


def run_export(config: Config) -> None:
    """``metapool export``: write the adapted network of the run's seed into ``export/``.

    Raises:
        UserError: it has not been trained, or as for :func:`export_network`.
    """
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    seed = architecture.seed
    trained = RunFolder(searched / run_folder.ADAPT / SEARCHED / str(seed))
    network = load_network(SEARCHED, architecture, seed, trained)
    folder = RunFolder(searched / run_folder.EXPORT)
    for name, difference in export_network(
        network, architecture.backbone.image_shape, folder
    ).items():
        print(f"{folder / name}: outputs differ by at most {difference:.1e}")


def export_network(
    model: nn.Module, image_shape: tuple[int, int, int], run: RunFolder
) -> dict[str, float]:
    """Write ``network.pt2`` and ``network.onnx``, or neither of them.

    Both take a batch of any size and hold plain torch or ONNX operations only, the weights of
    mixtures fixed. ``torch.export.load`` reads the first, without this package. Both are loaded
    again and compared with ``model`` in eval mode, on random images.

    Args:
        model: a trained network, such as a derived one; stays as it is.
        image_shape: of one input, (C, H, W).
        run: where the files go.

    Returns:
        The largest difference to ``model``, by file.

    Raises:
        UserError: the network cannot be exported, a file computes something else (see
            :data:`TOLERANCE`), an extra library is missing or the folder cannot be written.
    """
    _need_onnx()
    original = copy.deepcopy(model).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *image_shape, generator=generator) for size in _BATCHES]
    with torch.inference_mode():
        expected = [original(images) for images in batches]
    program = _export(to_plain(original), torch.randn(3, *image_shape, generator=generator))
    contents = {PROGRAM: _program_bytes(program), ONNX: _onnx_bytes(program)}
    runners = {PROGRAM: _load_program(contents[PROGRAM]), ONNX: _load_onnx(contents[ONNX])}
    largest = {
        name: max(
            _difference(name, runner(images), wanted)
            for images, wanted in zip(batches, expected, strict=True)
        )
        for name, runner in runners.items()
    }
    for name, content in contents.items():
        run.write(name, content)
    return largest


def _need_onnx() -> None:
    try:
        # torch.onnx asks for two of them itself, but only in the middle of its work.
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'exporting needs more libraries ({error}): pip install "metapool_kernels[export]"'
        ) from error


def _export(model: nn.Module, images: Tensor) -> ExportedProgram:
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    # Whatever a network does that cannot be traced: torch has no common base for these errors.
    except Exception as error:
        raise UserError(f"torch.export cannot take this network: {error}") from error
    ours = [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("metapool_kernels")
    ]
    if ours:
        raise UserError(
            f"the network calls {ours[0]!r} outside of its enhancers; use MetaPool2d, and give a "
            "subclass with a forward of its own a to_torch"
        )
    return program


def _program_bytes(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx_bytes(program: ExportedProgram) -> bytes:
    try:
        with redirect_stdout(io.StringIO()):  # onnxscript 0.6.0 prints how many rules it applied
            exported = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except Exception as error:
        raise UserError(f"torch.onnx cannot take this network: {error}") from error
    assert exported is not None
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _load_program(content: bytes) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(images)
        return logits

    return run


def _load_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _difference(name: str, got: Tensor, expected: Tensor) -> float:
    largest = (got - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    # Also where it is NaN.
    if not largest <= allowed:
        raise UserError(
            f"{name} computes something else than the network: outputs differ by {largest:.2g}, "
            f"allowed are {allowed:.2g}"
        )
    return largest
