"""``make gpu-check`` on a machine that lies: what hangs, crashes or is wrong costs itself alone."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benches.gpu_check import __main__ as gpu_check
from benches.gpu_check import figures, pack, page, steps, triage
from benches.gpu_check.figures import Measured
from benches.gpu_check.journal import BEGUN, CUT, DONE, FAILED, Event, Journal, read
from benches.gpu_check.page import Report
from benches.gpu_check.runner import Program, Step, run_step
from benches.gpu_model import PREDICTED

DEVICE = {"device": "NVIDIA H200"}


def _program(*arguments: str, patience: float = 20) -> Program:
    command = (sys.executable, "-m", "tests.house.lying", *arguments)
    return Program(arguments[0], command, {"METAPOOL_CUDA_HOST": ""}, patience)


def _run(tmp_path: Path, *programs: Program, seconds: float = 120) -> dict[str, Event]:
    """The last word on each row of a step."""
    path = tmp_path / "gpu-check.jsonl"
    run_step(Step("step", seconds, programs), path)
    return {event["row"]: event for event in read(path) if event["state"] != "planned"}


def test_each_row_costs_itself_alone(tmp_path: Path) -> None:
    found = _run(tmp_path, _program("rows", patience=4))
    states = {row: event["state"] for row, event in found.items()}
    assert states.pop("good, first") == DONE
    assert states.pop("good, last") == DONE
    assert set(states.values()) == {FAILED}
    whys = {row.split(",")[0].split()[0]: event.get("why", "") for row, event in found.items()}
    assert whys["hangs"] == "hung: silent for 4 s"
    assert whys["crashes"] == "crashed: SIGSEGV"
    assert whys["raises"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert whys["loses"] == "ended with exit code 3"
    assert whys["says"] == "gave no numbers"
    assert whys["leaves"] == "ended with exit code 0, in the middle of a row"
    crashed = next(event for row, event in found.items() if row.startswith("crashes"))
    assert "about to fault" in crashed["output"]
    text = Report(DEVICE, read(tmp_path / "gpu-check.jsonl")).markdown()
    assert "hangs, 8 x 96 x 56 x 56, bfloat16, channels_last, triton | hung: silent" in text


def test_programs_beside_each_other_do_not_wait_for_each_other(tmp_path: Path) -> None:
    found = _run(tmp_path, _program("start"), _program("rows", patience=4), seconds=60)
    assert found["the program itself"]["why"] == "ended with exit code 1"
    assert "no module named something" in found["the program itself"]["output"]
    assert found["good, last"]["state"] == DONE


def test_a_step_ends_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    found = _run(tmp_path, _program("forever"), seconds=8)
    assert time.monotonic() - began < 20
    states = [event["state"] for event in found.values()]
    assert states.count(CUT) == 1
    assert states.count(DONE) >= 1
    report = Report(DEVICE, read(tmp_path / "gpu-check.jsonl"))
    assert not report.failures
    assert report.not_reached("step") == 1000 - states.count(DONE)


def test_what_a_sanitizer_prints_counts_even_if_it_is_cut_off(tmp_path: Path) -> None:
    program = _program("races")
    program = replace(program, alarm=steps._SANITIZER["alarm"])
    found = _run(tmp_path, program, seconds=5)
    assert "Race reported" in found["the program itself"]["why"]
    assert found["the program itself"]["state"] == FAILED


def test_children_are_ended_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = _program("child", patience=8)
    program.environment["METAPOOL_CHILD"] = str(pid)  # type: ignore[index]
    _run(tmp_path, program)
    child = int(pid.read_text())
    deadline = time.monotonic() + 5
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_wrong_numbers_give_no_figures(tmp_path: Path) -> None:
    found = _run(tmp_path, _program("backend", patience=60))
    ours = [event for row, event in found.items() if row.endswith("reference")]
    assert len(ours) == 2
    for event in ours:
        assert event["state"] == FAILED
        assert event["why"].startswith("WrongNumbersError: tensor 0 is off by 1.0e-03")
    assert [e["who"] for e in found.values() if e["state"] == DONE] == ["eager"]


@pytest.mark.parametrize("capability", [None, "90"])
def test_all_steps_fit_into_one_call(
    capability: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine on which nothing has to be built: a call may take ten minutes."""
    monkeypatch.setattr(pack, "problem", lambda capability: None)
    planned = steps.steps(capability, {})
    names = [step.name for step in planned]
    order = ["libraries", "kernels", "triage", "figures", "network", "first step", "breadth"]
    assert names[:7] == order
    if capability:
        assert sum(step.seconds for step in planned) < 560
    for step in planned:
        titles = [program.name for program in step.programs]
        assert len(set(titles)) == len(titles) > 0


def test_without_a_pack_there_is_time_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "problem", lambda capability: "there is none")
    assert steps.steps("90", {})[0].seconds == 300


def test_the_most_important_rows_come_first() -> None:
    rows = figures.rows(tiny=False)
    assert len(rows) == len(set(map(str, rows)))
    first = {(row.case.size, row.case.candidates) for row in rows[:24]}
    assert first == {((96, 56, 56), "default")}
    assert {str(row.case.dtype) for row in rows[:24]} == {"torch.float32", "torch.bfloat16"}
    assert {row.who for row in rows[:24]} == set(figures.GPU_BACKENDS)
    peers = {"eager", "torch.compile", "nested max", "merged convolution"}
    assert {row.who for row in rows} == peers | set(figures.GPU_BACKENDS)


def test_every_prediction_has_its_measurement() -> None:
    """So that they stand side by side in one table."""
    predicted = json.loads(PREDICTED.read_text())
    assert len(predicted) == 64
    measured = {page._twin(figures._facts(row)) for row in figures.rows(tiny=False)}
    for line in predicted:
        for backend in figures.GPU_BACKENDS:
            name = (line["map"], line["dtype"], line["layout"], line["candidates"], line["what"])
            assert (*name, backend) in measured
            assert 0 < line["shares"][backend]["H200"] <= line["shares"][backend]["H100"] <= 1


def test_triage_has_every_dtype_layout_and_backend() -> None:
    for backend in figures.GPU_BACKENDS:
        rows = triage.rows(backend, tiny=False)
        found = {(row.case.dtype, row.channels_last) for row in rows}
        assert found == {(dtype, last) for dtype in triage.DTYPES for last in (False, True)}
        assert {row.who for row in rows} == {backend}


def _figure(row: Measured, seconds: float, copy: float, **more: float) -> dict[str, Any]:
    times = {"launched": seconds, "replayed": seconds, "copy launched": copy}
    return {**figures._facts(row), **times, "copy replayed": copy, "peak bytes": 0, **more}


def test_the_report(tmp_path: Path) -> None:
    rows = {str(row): row for row in figures.rows(tiny=False)}
    forward = next(row for row in rows.values() if "forward, float32, NCHW, triton" in str(row))
    both = next(row for row in rows.values() if "backward, float32, NCHW, triton" in str(row))
    journal = Journal(tmp_path / "gpu-check.jsonl", "figures", "figures")
    journal.write(str(forward), BEGUN)
    journal.write(str(forward), DONE, **_figure(forward, 0.2e-3, 0.1e-3))
    more = {"forward replayed": 0.2e-3}
    journal.write(str(both), DONE, **_figure(both, 0.5e-3, 0.1e-3, **more))
    journal.write("a row | that never ended", BEGUN)
    network = Journal(journal.path, "network", "network")
    network.write("no enhancers", DONE, seconds=0.1)
    network.write("ours, triton", DONE, seconds=0.115)
    report = page.write(tmp_path, DEVICE)
    text = (tmp_path / "gpu-check.md").read_text()
    main = [line for line in text.splitlines() if line.startswith("| 96 x 56² | float32 | NCHW |")]
    assert [line for line in main if "| forward |" in line and "% | 50% |" in line]
    # 0.3 ms for three maps, of which a copy moves two in 0.1 ms.
    assert [line for line in main if "| backward |" in line and "% | 50% |" in line]
    assert "| ours, triton | 115.0 | 1.15 |" in text
    assert "a row \\| that never ended" not in text  # rows are names; what failed is escaped
    assert [event["row"] for event in report.failures] == ["a row | that never ended"]
    kept = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {row["row"] for row in kept["rows"]} >= {str(forward), "no enhancers"}


def test_a_second_call_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed is run again, and correctness is looked at anew."""
    before = tmp_path / "before"
    before.mkdir()
    path = before / "gpu-check.jsonl"
    Journal(path, "network", "rows").write("good, first", DONE, seconds=7.0)
    Journal(path, "network", "rows").write("raises", FAILED, why="once")
    Journal(path, "triage", "rows").write("good, first", DONE, seconds=7.0)
    with open(path, "a") as file:
        file.write('{"step": "cut off while it was wri')
    planned = [
        Step("triage", 60, (_program("rows", patience=4),)),
        Step("network", 60, (replace(_program("rows", patience=4), measures=True),)),
    ]
    seen: list[Any] = []
    monkeypatch.setattr(gpu_check, "steps", lambda *given: seen.append(given) or planned)
    monkeypatch.setattr(gpu_check, "facts", lambda: DEVICE)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--dry-run", "--out", str(out), "--resume", str(before)]
    )
    assert gpu_check.main() == 1
    assert seen == [(None, {"network": ["raises"]})]
    rows = json.loads((out / "gpu-check.json").read_text())["rows"]
    by_step = {(row["step"], row["row"]): row for row in rows}
    assert by_step["network", "good, first"]["seconds"] == 7.0
    assert by_step["triage", "good, first"]["seconds"] == 1.0
    assert by_step["network", "raises"]["why"].startswith("RuntimeError")


def test_only_some_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [Step(name, 60, (_program("start"),)) for name in ("triage", "figures")]
    monkeypatch.setattr(gpu_check, "steps", lambda *given: planned)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--dry-run", "--out", str(tmp_path), "--only", "tri"]
    )
    assert gpu_check.main() == 1
    said = capsys.readouterr().out
    assert "== triage: at most 60 s" in said
    assert "figures" not in said


def test_only_some_steps_leave_the_others_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("triage", "network"):
        Journal(tmp_path / "gpu-check.jsonl", name, "start").write("old", DONE, seconds=7.0)
    planned = [Step("triage", 60, (_program("start"),))]
    monkeypatch.setattr(gpu_check, "steps", lambda *given: planned)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--dry-run", "--out", str(tmp_path), "--only", "tri"]
    )
    assert gpu_check.main() == 1
    kept = json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    assert {(row["step"], row["row"]) for row in kept} == {
        ("network", "old"),
        ("triage", "the program itself"),
    }


def test_a_program_that_has_not_begun_in_time_has_failed(tmp_path: Path) -> None:
    found = _run(tmp_path, _program("slow"), seconds=3)
    event = found["the program itself"]
    assert event["state"] == FAILED
    assert event["why"].startswith("cut off before its first row")


def test_a_promise_that_is_not_kept(tmp_path: Path) -> None:
    """A sanitizer that did not get at the program prints no summary."""
    for promise, states in (("row 0", []), ("SUMMARY: 0", [FAILED])):
        folder = tmp_path / promise[:3]
        folder.mkdir()
        found = _run(folder, replace(_program("short"), promise=promise))
        assert found["row 0"]["state"] == DONE
        failed = [event for event in found.values() if event["state"] == FAILED]
        assert [event["state"] for event in failed] == states


def test_the_suite_for_a_gpu_calls_the_op_there() -> None:
    """By the judge, which sends tensors to the device; else every backend there refuses them."""
    for path in steps._SUITE:
        assert "fused_meta_pool(" not in (Path(__file__).parents[2] / path).read_text()


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "--dry-run" in capsys.readouterr().err


def test_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(tmp_path / "nowhere")
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--dry-run", "--out", str(tmp_path), "--resume", where]
    )
    assert gpu_check.main() == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack for sm_90, made of the present sources."""
    folder = tmp_path / "gpu-pack"
    folder.mkdir()
    for name in (*pack.LIBRARIES.values(), pack.BUILD_FILE):
        (folder / name).write_text(f"packed {name}")
    note = {
        "sources": pack.fingerprint(),
        "commit": "abc",
        "architectures": ["sm_90"],
        "machine": os.uname().machine,
    }
    (folder / pack.NOTE).write_text(json.dumps(note))
    monkeypatch.setattr(pack, "PACK", folder)
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    return folder


def _change(packed: Path, **changes: object) -> None:
    note = json.loads((packed / pack.NOTE).read_text())
    (packed / pack.NOTE).write_text(json.dumps(note | changes))


def test_a_pack_that_fits(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "ROOT", Path(pack.__file__).parents[2])
    assert pack.problem("90") is None
    assert pack.problem("80") == "it is for sm_90, and the GPU is sm_80"
    _change(packed, machine="riscv64")
    assert "it is for riscv64" in (pack.problem("90") or "")
    _change(packed, machine=os.uname().machine, sources="0")
    assert "the sources have changed" in (pack.problem("90") or "")


def test_no_pack(packed: Path) -> None:
    (packed / pack.NOTE).unlink()
    assert "`make gpu-pack` makes one" in (pack.problem("90") or "")


def test_installing_a_pack(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "_torch_ops.so").write_text("older")
    monkeypatch.setattr(pack, "PACKAGE", package)
    pack.install()
    assert {path.name for path in package.iterdir()} == {
        "_torch_ops.so", "_torch_ops_cuda.so", "_build.json"
    }  # fmt: skip
    assert (package / "_torch_ops.so").read_text() == "packed _torch_ops.so"
