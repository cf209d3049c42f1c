"""Runs tests in forks of a process that has loaded torch: alone that takes longer than many tests.

As a program it takes calls from its input, one a line, and answers with their exit status.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LOADED = ("torch", "numpy", "hypothesis", "pytest")
"""Nothing of the project, and nothing that looks at the environment of a run."""


class Forks:
    """Runs pytest, each time in another folder and environment if need be."""

    def __init__(self) -> None:
        # Two versions of a file that have one size and one second are the same to a cache of bytes.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation.forks"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str], limit: float
    ) -> tuple[int | None, str]:
        """The exit status, None after ``limit`` seconds, and what was printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as temporary:
            output = Path(temporary) / "output"
            call = [list(arguments), str(folder), environment, limit, str(output)]
            self._process.stdin.write(json.dumps(call) + "\n")
            self._process.stdin.flush()
            status = json.loads(self._process.stdout.readline())
            return status, output.read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _run_tests(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Become the process of a run, and end with it."""
    import pytest

    os.setsid()
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, mode, 0o600), number)
    os.dup2(1, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", os.getcwd()))]
    status = pytest.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def _wait(process: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)  # tests may have processes of their own
    os.waitpid(process, 0)
    return None


def main() -> None:
    for name in LOADED:
        __import__(name)
    for line in sys.stdin:
        arguments, folder, environment, limit, output = json.loads(line)
        process = os.fork()
        if process == 0:
            _run_tests(arguments, folder, environment, output)
        print(json.dumps(_wait(process, limit)), flush=True)


if __name__ == "__main__":
    main()
