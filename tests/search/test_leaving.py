"""Leaving early, and in strange surroundings: one line, one exit code, nothing lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metapool_kernels.search.cli import main
from metapool_kernels.search.machine.interrupts import kept_from_children, never_lost
from tests.search.run_by_hand import evaluation, write_run
from tests.search.runs import REPOSITORY, metrics, options
from tests.search.test_search import assert_same_search


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal; a shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted:
    """In its destructor, where Python drops whatever is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_within_a_destructor_is_not_lost() -> None:
    hook = sys.unraisablehook
    with never_lost(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        held = Interrupted()
        del held
        time.sleep(10)
    assert sys.unraisablehook is hook


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_interrupt_waits_until_children_have_started_and_is_not_theirs(method: str) -> None:
    child = multiprocessing.get_context(method).Process(target=time.sleep, args=(1.5,))
    with pytest.raises(KeyboardInterrupt), kept_from_children():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        child.start()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    child.join(timeout=30)
    assert child.exitcode == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def run(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """``metapool`` in a session of its own, each line written at once."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "metapool_kernels.search", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def told(errors: str) -> str:
    (line,) = [line for line in errors.splitlines() if "warning" not in line]
    return line


@pytest.mark.costly
def test_ctrl_c_reaches_workers_too_and_is_told_once(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    process = run("search", *options(folder, data__workers=2))
    while process.poll() is None and not (folder / "metrics.csv").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert told(errors).endswith(f"metapool search --config '{folder}/config.yaml' --resume")
    assert len(metrics(folder)) < 8


@pytest.mark.costly
@pytest.mark.usefixtures("quick_pictures")
def test_a_pipe_that_closes_ends_a_search_that_goes_on_later(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = run("search", *options(folder))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("epoch   1")
    process.stdout.close()
    line = told(process.stderr.read())
    assert process.wait(timeout=240) == 2
    assert line.startswith("metapool: nobody reads") and line.endswith("config.yaml --resume")
    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_search(finished, folder)


def test_a_notebook_s_backend_does_not_matter(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluation())
    process = run(
        "plot", f"--output={folder}", MPLBACKEND="module://matplotlib_inline.backend_inline"
    )
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("rank", "local_rank", "tells"), [("8", "0", True), ("8", None, True), ("1", "1", False)]
)
def test_the_first_process_of_each_machine_tells_what_is_wrong_there(
    rank: str,
    local_rank: str | None,
    tells: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["search", "--config", "not_on_this_machine.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == tells and all("not_on_this_machine.yaml" in line for line in lines)
