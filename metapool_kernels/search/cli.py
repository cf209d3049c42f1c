"""``metapool search``, ``metapool adapt``, ``metapool evaluate``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import torch

from metapool_kernels.search.adapt import run_adapt
from metapool_kernels.search.config import Config, config_parser, to_config
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.evaluate import run_evaluate
from metapool_kernels.search.loop import run_search
from metapool_kernels.search.run_folder import ADAPT, CONFIG

_COMMANDS = {
    "search": "choose a pooling for every layer",
    "adapt": "train the network that was found, and the same one without enhancers",
    "evaluate": "measure both on the images that no training has seen",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 after a mistake of the user, explained by one line on stderr; 130 after Ctrl-C.
    """
    try:
        parser = _parser()
        parsed = parser.parse_args(arguments)
        command: str = parsed.subcommand
        settings = parser.instantiate(parsed)[command]
        config = to_config(settings)
    except jsonargparse.ArgumentError as error:
        return _fail(error)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        if command == "search":
            run_search(config, resume=settings.resume, overwrite=settings.overwrite)
        elif command == "adapt":
            run_adapt(config, resume=settings.resume, overwrite=settings.overwrite)
        else:
            run_evaluate(config)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print(f"metapool: interrupted; {_how_to_go_on(command, config)}", file=sys.stderr)
        return 130
    return 0


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="metapool",
        description="Progressive Meta-Pooling Learning: search the pooling of every layer.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands()
    for name, description in _COMMANDS.items():
        command = config_parser(description=description)
        command.add_argument("--config", action="config", help="YAML file with the settings")
        if name != "evaluate":
            command.add_argument(
                "--resume", action="store_true", help="go on after the last finished epoch"
            )
            command.add_argument(
                "--overwrite", action="store_true", help="delete what the output folder holds"
            )
        commands.add_subcommand(name, command, help=description)
    return parser


def _how_to_go_on(command: str, config: Config) -> str:
    folder = Path(config.output) / (ADAPT if command == "adapt" else "")
    if not (folder / CONFIG).exists():
        return "nothing has been written"
    option = "" if command == "evaluate" else " --resume"
    return f"go on with: metapool {command} --config {folder / CONFIG}{option}"


def _fail(error: Exception) -> int:
    print("metapool:", " ".join(str(error).split()), file=sys.stderr)
    return 2
