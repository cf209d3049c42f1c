"""A look at the image files before anything is trained on them."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from tqdm import tqdm

from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.images import ImageSet, files_of
from metapool_kernels.search.data.splits import Data
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.json_file import parse_json
from metapool_kernels.search.machine.collective import on_main
from metapool_kernels.search.machine.interrupts import kept_from_children
from metapool_kernels.search.settings.config import Config

_NAMED = 10
"""How many unusable images an error message describes."""

_SILENT = 2.0
"""Seconds after which a progress bar appears."""

_BATCH = 32
"""Images that a worker hands over at a time."""


@dataclass(frozen=True)
class Found:
    """What a look at all images has come to: digests of both parts, and what is doubtful."""

    contents: tuple[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """One image file: its place, a digest of its content, or why it cannot be used."""

    index: int
    digest: str
    refusal: str


class _Files(Dataset[_Seen]):
    """The files behind a dataset, numbered from ``first`` on."""

    def __init__(self, images: ImageSet, first: int) -> None:
        self.images = images
        self.paths = files_of(images.images)
        self.first = first

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Seen:
        try:
            self.images.converted(index)
            content = Path(self.paths[index]).read_bytes()
        except UserError as error:
            return _Seen(self.first + index, "", str(error))
        return _Seen(self.first + index, blake2b(content, digest_size=16).hexdigest(), "")


def load_inspected(config: Config, accelerator: Accelerator) -> Data:
    """The images that ``config.data`` asks for, each file of them opened once.

    All processes share the work, which is that of loading one epoch. It is not done again while
    names, sizes and times of the files stay the same.

    Raises:
        UserError: as for :func:`load_data`; or images cannot be used, or those for evaluation are
            the very ones that are trained on.
    """
    with accelerator.local_main_process_first():
        data = load_data(config)
    train, evaluation = data.train_set, data.evaluation_set
    if not (isinstance(train, ImageSet) and isinstance(evaluation, ImageSet)):
        return data
    parts = _Files(train, 0), _Files(evaluation, len(train))
    if not all(len(part) for part in parts):
        return data
    cache = _cache(parts)
    found = on_main(lambda: _remembered(cache))
    if found is None:
        found = _judge(parts, _look(parts, config.data.workers, accelerator))
        if accelerator.is_main_process:
            _remember(cache, found)
    return replace(data, contents=found.contents, warnings=(*data.warnings, *found.warnings))


def _look(parts: Sequence[_Files], workers: int, accelerator: Accelerator) -> list[_Seen]:
    """All images of both parts, in order, each opened by one of the processes."""
    images: ConcatDataset[_Seen] = ConcatDataset(parts)
    share = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(
        Subset(images, share), batch_size=_BATCH, num_workers=workers, collate_fn=list
    )
    with kept_from_children():
        iterator = iter(loader)
    bar = tqdm(
        total=len(share),
        desc="looking at the images",
        delay=_SILENT,
        disable=None if accelerator.is_main_process else True,
    )
    seen: list[_Seen] = []
    with bar:
        for batch in iterator:
            seen += batch
            bar.update(len(batch))
    return sorted(gather_object(seen), key=lambda image: image.index)


def _judge(parts: tuple[_Files, _Files], seen: Sequence[_Seen]) -> Found:
    refusals = [image.refusal for image in seen if image.refusal]
    if refusals:
        more = f"; and {len(refusals) - _NAMED} more" if len(refusals) > _NAMED else ""
        count = f"{len(refusals)} images cannot be used: " if len(refusals) > 1 else ""
        raise UserError(f"{count}{'; '.join(refusals[:_NAMED])}{more}")
    digests = [image.digest for image in seen]
    train, evaluation = digests[: len(parts[0])], digests[len(parts[0]) :]
    warnings = []
    trained_on = set(train)
    if trained_on == set(evaluation):
        raise UserError(
            f"{parts[1].images.name!r} holds the same images as {parts[0].images.name!r}, by a "
            "link or as copies; evaluation needs images that are not trained on"
        )
    known = sum(digest in trained_on for digest in evaluation)
    if known:
        warnings.append(
            f"{known} of {len(evaluation)} images for evaluation are also trained on, as copies; "
            "accuracies will be too high"
        )
    if len(trained_on) < len(train):
        warnings.append(
            f"{len(train) - len(trained_on)} of {len(train)} training images are copies of others; "
            "the weight half and the alpha half share some"
        )
    targets = [*parts[0].images.targets, *parts[1].images.targets]
    labelled = len(set(zip(digests, targets, strict=True))) - len(set(digests))
    if labelled:
        warnings.append(f"{labelled} images are in more than one class, as copies")
    return Found((_digest(train), _digest(evaluation)), tuple(warnings))


def _digest(facts: object) -> str:
    return sha256(json.dumps(facts).encode()).hexdigest()


def _cache(parts: Sequence[_Files]) -> Path | None:
    """Where it is remembered what a look at these very files has found; None: nowhere."""
    with suppress(OSError, RuntimeError):
        facts: list[object] = [1]  # the version of this format
        for part in parts:
            facts += [part.images.mode, list(part.images.targets)]
            for path in part.paths:
                status = os.stat(path)
                facts.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return home / "metapool_kernels" / f"{_digest(facts)}.json"
    return None


def _remembered(cache: Path | None) -> Found | None:
    # Whatever is wrong with the file, the images can be looked at again.
    with suppress(OSError, ValueError, TypeError, KeyError):
        if cache is not None:
            content = parse_json(cache.read_text())
            (train, evaluation), warnings = content["contents"], content["warnings"]
            return Found((str(train), str(evaluation)), tuple(map(str, warnings)))
    return None


def _remember(cache: Path | None, found: Found) -> None:
    with suppress(OSError):  # without it all is slower and nothing else
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(asdict(found)) + "\n")
            temporary.replace(cache)
