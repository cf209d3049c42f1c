"""The instrument itself: peers that are right, turns that are taken, wrong figures withheld."""

from dataclasses import replace

import pytest
import torch

from benches import normalized, opencv
from benches.cases import Case, Mode, benchmark_cases, report_cases
from benches.figures import best_torch_peer, rows
from benches.measure import measure, problem
from benches.peers import COPY, EAGER, OURS, PEERS, Peer, Product, peers_for
from benches.pyramid import LAYOUTS, PYRAMIDS, check
from benches.timing import CALLS_IN_A_TURN, Effort, Times, interleave

SMALL = Case((5, 11, 9), batch=2)
ONCE = Effort(seconds=0, least=1)


def _require(peer: str) -> None:
    if peer.startswith("OpenCV") and opencv.cv2 is None:
        pytest.skip("cv2 is not installed")


CASES = [
    replace(SMALL, mode=mode, candidates=candidates, dtype=dtype, slow_peers=True)
    for mode in Mode
    for candidates in ("default", "avg", "max")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peers_agree_with_the_definition(case: Case) -> None:
    """But for torch.compile, which takes half a minute, and for cv2 where it is not installed."""
    peers = {name: peer for name, peer in peers_for(case).items() if name != "torch.compile"}
    assert {*OURS, EAGER} < set(peers)
    assert {name: problem(case, peer) for name, peer in peers.items()} == dict.fromkeys(peers)


def test_every_peer_suits_some_case() -> None:
    suited = {name for case in CASES for name in peers_for(case)}
    assert {name for name in set(PEERS) - suited if not name.startswith("OpenCV")} == set()


@pytest.mark.parametrize("peer", ["OpenCV", "OpenCV, poolings alone"])
@pytest.mark.parametrize("channels", [opencv.GROUP, opencv.GROUP + 16])
def test_opencv_takes_any_number_of_channels(peer: str, channels: int) -> None:
    _require(peer)
    assert problem(replace(SMALL, size=(channels, 7, 6)), PEERS[peer]) is None


def test_rounds_call_all_in_turn() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(runs, Effort(seconds=0, least=2))
    turn = [name for name in "abc" for _ in range(CALLS_IN_A_TURN)]
    assert calls == ["a", "b", "c", *turn, *turn]
    assert {name: value.calls for name, value in times.items()} == dict.fromkeys("abc", 10)


def test_a_wrong_peer_is_withheld() -> None:
    eager = PEERS[EAGER]
    peers = {
        COPY: PEERS[COPY],
        EAGER: eager,
        "no mix": Peer(lambda names: lambda x, weights: x),
        "slightly off": Peer(lambda names: lambda x, w: eager.make(names)(x, w) * 1.001),
        "parts as mix": replace(eager, product=Product.PARTS),
    }
    result = measure(SMALL, ONCE, peers)
    assert set(result.times) == {COPY, EAGER}
    assert set(result.withheld) == {"no mix", "slightly off", "parts as mix"}


def test_a_peer_with_a_wrong_gradient_is_withheld() -> None:
    def detached(names: tuple[str, ...]) -> object:
        run = PEERS[EAGER].make(names)
        return lambda x, weights: run(x, weights) + 0.01 * (x - x.detach())

    assert problem(SMALL, Peer(detached)) is None
    assert "is off by" in (problem(replace(SMALL, mode=Mode.BOTH), Peer(detached)) or "")


def test_a_peer_that_fails_is_withheld() -> None:
    def failing(names: tuple[str, ...]) -> object:
        def run(x: object, weights: object) -> object:
            raise RuntimeError("no compiler\nand more")

        return run

    assert problem(SMALL, Peer(failing)) == "fails: no compiler"


def test_ratios_are_of_medians() -> None:
    milliseconds = {OURS[0]: 2.0, EAGER: 20.0, "nested max": 10.0, "OpenCV": 5.0, COPY: 1.0}
    times = {name: Times.of([value / 1e3] * 3) for name, value in milliseconds.items()}
    assert best_torch_peer(times) == "nested max"
    result = replace(measure(SMALL, ONCE, {COPY: PEERS[COPY]}), times=times)
    (row,) = rows([result])
    assert (row.copies, row.over_eager, row.over_best, row.over_opencv) == (2, 10, 5, 2.5)


@pytest.mark.parametrize("cases", [report_cases, benchmark_cases])
@pytest.mark.parametrize("quick", [False, True])
def test_no_case_is_measured_twice(cases: object, quick: bool) -> None:
    assert callable(cases)
    found = [str(case) for case in cases(quick)]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pyramids_agree(layout: str) -> None:
    check((1, 5, 14, 15), layout)


def test_a_wrong_pyramid_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PYRAMIDS, "ours", lambda x: torch.cat([x, x, x, x], 1))
    with pytest.raises(AssertionError, match=r"^ours"):
        check((1, 5, 14, 15), "NCHW")


@pytest.mark.parametrize("layout", normalized.LAYOUTS)
def test_normalised_mixtures_agree(layout: str) -> None:
    normalized.check((2, 5, 14, 15), layout)


def test_a_wrong_normalised_mixture_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = normalized.MIXTURES["poolings, sum"]
    monkeypatch.setitem(normalized.MIXTURES, "ours", plain)
    with pytest.raises(AssertionError, match="not close"):
        normalized.check((2, 5, 14, 15), "NCHW")
