"""ncnn."""

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner, image_shape, with_batch
from metapool_kernels.plain import Form

FILES = ["network.ncnn.param", "network.ncnn.bin"]


class Ncnn:
    """By way of pnnx, its converter; it takes one image at a time."""

    packages = ("ncnn", "pnnx")
    form = Form()
    any_batch = True

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write ``network.ncnn.param`` and ``network.ncnn.bin``."""
        images = torch.zeros(1, *image_shape(program))
        with TemporaryDirectory(dir=folder) as temporary:
            place = Path(temporary)
            # The one format that pnnx reads of which torch.export has not its own dialect.
            module = with_batch(program, 1).module()
            traced = torch.jit.trace(module, images, check_trace=False)
            torch.jit.save(traced, place / "network.pt")
            _pnnx(place, images)
            for name in FILES:
                (place / name).rename(folder / name)
        _check_layers(folder / FILES[0])
        return Converted(FILES)

    def load(self, folder: Path, batch: int) -> Runner:
        """A net with no type but float32."""
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = 1
        # All of which it switches on by itself where the processor has them.
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if net.load_param(str(folder / FILES[0])) or net.load_model(str(folder / FILES[1])):
            raise RuntimeError("ncnn does not load what pnnx has written")

        def run_one(image: NDArray[np.float32]) -> NDArray[np.float32]:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(image))
            failed, logits = extractor.extract("out0")
            if failed:
                raise RuntimeError(f"ncnn ends with code {failed}")
            return np.array(logits)

        return lambda images: np.stack([run_one(image) for image in images])


def _pnnx(place: Path, images: torch.Tensor) -> None:
    import pnnx

    sizes = ",".join(map(str, images.shape))
    call = [pnnx.EXEC_PATH, "network.pt", f"inputshape=[{sizes}]f32", "fp16=0"]
    done = subprocess.run(call, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode or not (place / FILES[0]).exists():
        said = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
        raise RuntimeError(f"pnnx ends with code {done.returncode}: {said[-1]}")


def _check_layers(param: Path) -> None:
    """Operators that pnnx has no layer for it writes under the names that they have in torch."""
    kinds = {line.split()[0] for line in param.read_text().splitlines()[2:] if line.strip()}
    strange = sorted(kind for kind in kinds if not kind.isalnum())
    if strange:
        raise RuntimeError(f"ncnn has no layer for {', '.join(strange)}")
