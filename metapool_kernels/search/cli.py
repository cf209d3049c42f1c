"""``metapool cost | search | adapt | evaluate | plot | export``."""

import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

try:
    import jsonargparse
    from jsonargparse.typing import PositiveInt
except ModuleNotFoundError as error:
    raise SystemExit(
        f"metapool: {error}; get what the search needs with "
        "`pip install 'metapool_kernels[search]'`"
    ) from error

from metapool_kernels.devices.registry import NAMES, target_names
from metapool_kernels.search.errors import OwnError, ToldError, UserError
from metapool_kernels.search.files.yaml_file import MODE, parse_yaml
from metapool_kernels.search.machine.interrupts import never_lost
from metapool_kernels.search.run.run_folder import ADAPT, CONFIG
from metapool_kernels.search.settings.config import Config, UserPath
from metapool_kernels.search.settings.config_file import check_sections, config_parser, to_config

_COMMANDS = {
    "cost": "measure or count what each pooling costs in each layer, for search.cost.file",
    "search": "choose a pooling for every layer",
    "adapt": "train the network that was found, and its controls at the same budget",
    "evaluate": "measure these networks on the images that no training has seen",
    "plot": "draw the pictures and the one-page report of a run again",
    "export": "write the trained network for torch.export, ONNX and the runtimes of devices",
}

_MAPPING = "model.arguments"
"""Of one that is no section jsonargparse would keep the last file's part alone."""

_MISREAD = (TypeError, ValueError, RecursionError)
"""What jsonargparse lets through of strange files and values."""

PRESETS = Path(__file__).parent / "presets"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 after a mistake of the user, explained by one line on stderr; 130 after Ctrl-C.
    """
    with never_lost():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    how_to_go_on: Callable[[], str] = lambda: "nothing has been written"  # noqa: E731
    try:
        command, config, settings = _read(_widest_first(arguments))
        how_to_go_on = partial(_how_to_go_on, command, config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with _without_backend():
            _run(command, config, settings)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"metapool: interrupted; {how_to_go_on()}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return _fail(UserError(f"nobody reads the output any more; {how_to_go_on()}"))
    _nobody_reads()  # which is no mistake, now that all is done
    return 0


def _read(arguments: Sequence[str]) -> tuple[str, Config, Any]:
    """The command, the configuration, and what else was set.

    Raises:
        UserError: there is no such command, or no such settings.
    """
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
        command: str = parsed.subcommand
        check_sections(parsed[command])
        settings = parser.instantiate(parsed)[command]
    except (jsonargparse.ArgumentError, *_MISREAD) as error:
        raise UserError(str(error)) from error
    if settings.get("overwrite") and not any(_name(text) == "--output" for text in arguments):
        _check_outputs(settings.get("config") or ())
    return command, to_config(settings), settings


def _run(command: str, config: Config, settings: Any) -> None:
    """Import a command and run it: ``--help`` and mistakes need not wait for timm and the rest."""
    module = import_module(f"metapool_kernels.search.commands.{command}")
    if command == "search" and settings.dry_run:
        module.run_dry(config)
    elif command == "search":
        module.run_search(config, resume=settings.resume, overwrite=settings.overwrite)
    elif command == "adapt":
        again = {"resume": settings.resume, "overwrite": settings.overwrite}
        module.run_adapt(config, jobs=int(settings.jobs), **again)
    elif command == "cost":
        module.run_cost(config, target=settings.target, file=settings.file)
    elif command == "plot":
        module.run_plot(config, beside=settings.beside)
    elif command == "export":
        module.run_export(config, _targets(settings.target))
    else:
        getattr(module, f"run_{command}")(config)


def _widest_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, files before sections before single settings.

    jsonargparse lets the later one win, so that what stands before ``--config`` would be lost.
    """
    groups: list[list[str]] = [[]]
    for text in arguments:
        if text.startswith("--"):
            groups.append([])
        groups[-1].append(text)
    command, *options = groups
    options.sort(key=lambda group: (_name(group[0]) != "--config", _name(group[0]).count(".")))
    return [text for group in (command, *options) for text in group]


def _name(option: str) -> str:
    return option.partition("=")[0]


def _check_outputs(files: Sequence[Any]) -> None:
    """Refuse to choose between the folders that several files name, where one is to be deleted.

    Raises:
        UserError: they differ.
    """
    contents = [parse_yaml(file.read_text()) for file in files if file is not None]
    outputs = sorted({str(content["output"]) for content in contents if "output" in content})
    if len(outputs) > 1:
        raise UserError(
            f"--overwrite would delete a run, and --config names {' and '.join(outputs)}; say "
            "which one by --output"
        )


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="metapool",
        description="Progressive Meta-Pooling Learning: search the pooling of every layer.",
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=MODE,
    )
    commands = parser.add_subcommands()
    for name, description in _COMMANDS.items():
        command = config_parser(description=description)
        command.add_argument(
            "--config",
            action=_Config,
            help="YAML file with the settings, or a preset of the method "
            f"({', '.join(preset_names())}); may be repeated, the later one wins; options win over "
            "all of them",
        )
        _add_options(name, command)
        commands.add_subcommand(name, command, help=description)
    return parser


def _add_options(name: str, command: jsonargparse.ArgumentParser) -> None:
    """What a command takes beside the settings."""
    if name == "search":
        command.add_argument(
            "--dry_run",
            action="store_true",
            help="print where enhancers would go, and write nothing",
        )
    if name in ("search", "adapt"):
        either = command.add_mutually_exclusive_group()
        either.add_argument(
            "--resume", action="store_true", help="go on after the last finished epoch"
        )
        either.add_argument(
            "--overwrite", action="store_true", help="delete what the output folder holds"
        )
    if name == "export":
        command.add_argument(
            "--target",
            default="onnx",
            help=f"runtimes to convert for and to try the result in: {','.join(NAMES)}, one or "
            "several with commas between them; each is an extra of this package",
        )
    if name == "adapt":
        command.add_argument(
            "--jobs",
            type=PositiveInt,
            default=1,
            help="networks to train at a time, each in a process of its own; give each its "
            "share of the cores by --threads",
        )
    if name == "cost":
        command.add_argument(
            "--target",
            required=True,
            help="a runtime on this machine, as in metapool export; or counted "
            "(multiply-adds and comparisons), counted-bytes",
        )
        command.add_argument(
            "--file",
            type=UserPath,
            help="where the table goes; the output folder's name with .cost.json behind it "
            "unless it is given",
        )
    if name == "plot":
        command.add_argument(
            "--beside",
            type=UserPath,
            nargs="+",
            default=[],
            help="folders of other evaluated runs, to be drawn beside this one in front.png",
        )


def _targets(text: str) -> list[str]:
    try:
        return target_names([name.strip() for name in text.split(",") if name.strip()])
    except ValueError as error:
        raise UserError(f"--target {text!r}: {error}") from error


def preset_names() -> list[str]:
    """What ``--config`` takes beside files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class _Config(jsonargparse.ActionConfigFile):  # type: ignore[misc, name-defined]
    """Reads a YAML file, or one of the package's by its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        if values in preset_names():
            values = str(PRESETS / f"{values}.yaml")
        before = cfg.get(_MAPPING) or {}
        try:
            super().__call__(parser, cfg, values, option_string)
        except (jsonargparse.ArgumentError, *_MISREAD) as error:
            raise jsonargparse.ArgumentError(None, f"{values!r}: {error}") from error
        if isinstance(cfg.get(_MAPPING), dict):
            cfg[_MAPPING] = before | cfg[_MAPPING]


def _how_to_go_on(command: str, config: Config) -> str:
    folder = Path(config.output) / (ADAPT if command == "adapt" else "")
    if command == "cost" or not (folder / CONFIG).exists():
        return "nothing has been written"
    option = ["--resume"] if command in ("search", "adapt") else []
    call = ["metapool", command, "--config", str(folder / CONFIG), *option]
    return f"go on with: {shlex.join(call)}"


@contextmanager
def _without_backend() -> Iterator[None]:
    """Whatever a notebook has told matplotlib of its own Python: these pictures are files."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _nobody_reads() -> bool:
    """Whether what stdout or stderr lead to has gone; if so, what is left for it is dropped."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # in other programs it may be no file
            ends = select.poll()
            ends.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in ends.poll(0)):
                found = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found


def _fail(error: UserError) -> int:
    # What is wrong on a machine only the processes there can tell, and the first of them does.
    first_here = os.environ.get("LOCAL_RANK", "0") == "0" and not isinstance(error, ToldError)
    if first_here or isinstance(error, OwnError):
        print("metapool:", " ".join(str(error).split()), file=sys.stderr)
    return 2
