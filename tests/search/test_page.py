"""The report: every layer and number in it, everything escaped, nothing from elsewhere."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metapool_kernels.search.report.choices import layer_rows
from metapool_kernels.search.report.gains import gains
from metapool_kernels.search.report.page import report_page
from metapool_kernels.search.run.results import NetworkResult, Results, SeedResult, load_results
from metapool_kernels.search.run.run_folder import ALPHA, CONTROLS, RunFolder
from tests.search.run_by_hand import CANDIDATES, evaluation, write_run

PICTURES = {ALPHA: b"\x89PNG alpha", CONTROLS: b"\x89PNG controls"}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Cells by row, sources of pictures, all other text; and that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif "style" not in self._open:
            self.text += data


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return load_results(RunFolder(write_run(tmp_path / "run", evaluation())))


def test_every_layer_is_in_the_table(results: Results) -> None:
    page = Page(report_page(results, PICTURES))
    start = page.rows.index(["layer", "map", "choice", "probability", "margin", "epoch", "reason"])
    rows = page.rows[start + 1 : start + 4]
    assert rows == [list(row) for row in layer_rows(results.architecture)]
    assert rows[0] == ["blocks.1.0.bn2", "8x8", "avg_pool_3x3", "0.688", "0.438", "2", "margin"]
    assert rows[2][2] == "0.75 skip_connect + 0.25 avg_pool_3x3"


def test_every_number_of_the_evaluation_is_in_the_table(results: Results) -> None:
    page = Page(report_page(results, PICTURES))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["searched"] == [
        *("scratch", "8", "123,456", "96.88 ± 0.88 %", "0: 97.50 % (390); 1: 96.25 % (385)"),
        *("0.1250", "what the search has chosen"),
    ]
    assert rows["without enhancers"][2:4] == ["111,222", "95.12 ± 0.53 %"]
    assert rows["uniform mix"][4] == "0: 96.50 % (386); 1: 96.00 % (384)"
    assert "400 images" in page.text


def test_what_the_search_itself_left_stands_beside_what_was_trained(results: Results) -> None:
    assert results.evaluation is not None
    seeds = {"3": SeedResult(correct=308, accuracy=77.0, loss=0.875)}
    results.evaluation.inherited = NetworkResult("searched", 0, 123456, seeds, 77.0, None)
    page = Page(report_page(results, PICTURES))
    names = [row[0] for row in page.rows]
    number = names.index("searched") + 1
    assert page.rows[number] == [
        *("searched, before training", "searched", "0", "123,456", "77.00 %", "3: 77.00 % (308)"),
        *("0.8750", "what training brings beyond the weights of the search"),
    ]
    assert not any("before training" in line for line in gains(results.evaluation))


def test_the_first_lines_give_the_result_and_what_was_chosen(results: Results) -> None:
    text = Page(report_page(results, PICTURES)).text
    assert (
        "The network that was found names 96.88 ± 0.88 % of 400 held-out images correctly." in text
    )
    assert (
        "Of 3 layers the search has chosen avg_pool_3x3 in 1, max_pool_3x3 in 1, skip_connect in 1 "
        "(1 with a second one beside it)."
    ) in text


def test_without_an_evaluation_it_says_which_command_makes_one(results: Results) -> None:
    results.evaluation = None
    page = Page(report_page(results, {ALPHA: PICTURES[ALPHA]}))
    assert "metapool evaluate" in page.text and "held-out" not in page.text
    assert "Of 3 layers the search has chosen" in page.text
    assert len(page.sources) == 1


def test_the_settings_that_matter_are_there(results: Results) -> None:
    rows = {row[0]: row[1] for row in Page(report_page(results, PICTURES)).rows}
    assert rows["backbone"].startswith("mobilenetv2_035(output_stride=4, num_classes=10")
    assert rows["data"] == "digits"
    assert rows["candidates"] == ", ".join(CANDIDATES)
    assert rows["each pooling is normalised"] == "no"
    assert rows["seed"] == "3"
    assert rows["torch version"] == "2.99" and rows["metapool_kernels version"] == "1.2.3"
    assert "delta 0.2" in rows["stop"]


def test_settings_that_change_what_is_compared_are_told(results: Results) -> None:
    results.config.search.train_weights = False
    results.config.search.progressive = False
    results.architecture.candidate_norm = True
    results.config.model.weights = "teacher"
    results.config.search.alpha.tilt = 1.5
    results.config.search.alpha.tasks = 2
    rows = {row[0]: row[1] for row in Page(report_page(results, PICTURES)).rows}
    assert rows["weights"] == "not trained, begun with teacher"
    assert rows["search"].endswith("every layer open to the deadline")
    assert "2 tasks, tilt 1.5" in rows["alpha"]
    assert rows["each pooling is normalised"] == "yes"


@pytest.mark.parametrize("skipping", [1, 2])
def test_a_collapse_is_told(results: Results, skipping: int) -> None:
    for i, layer in enumerate(results.architecture.layers):
        layer.choice, layer.weights = [CANDIDATES[0 if i < skipping else 1]], [1.0]
    text = Page(report_page(results, PICTURES)).text
    assert ("2 of 3 layers chose skip_connect" in text) is (skipping == 2)


def test_nothing_comes_from_elsewhere(results: Results) -> None:
    text = report_page(results, PICTURES)
    page = Page(text)
    assert len(page.sources) == 2
    for source, picture in zip(page.sources, (PICTURES[CONTROLS], PICTURES[ALPHA]), strict=True):
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64" and b64decode(content) == picture
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "a", "base", "embed"})
    assert page.attributes <= {"lang", "charset", "name", "content", "class", "src", "alt"}
    assert not re.search(r"url\(|@import|https?:|//", text.replace("base64,", ""))


def test_all_text_is_escaped(results: Results) -> None:
    evil = "<script>alert('1')</script>&amp;"
    architecture = results.architecture
    architecture.backbone.name = architecture.insert_after = evil
    architecture.backbone.arguments = {evil: evil}
    architecture.versions = {evil: evil}
    architecture.extra_candidates = [evil]
    architecture.layers[0].name = architecture.layers[0].choice[0] = evil
    results.config.data.root = results.config.data.name = results.config.model.weights = evil
    assert results.evaluation is not None
    networks = results.evaluation.networks
    networks[evil] = networks["none"]
    networks["none"].start = evil
    networks["none"].seeds[evil] = networks["none"].seeds["0"]
    text = report_page(results, PICTURES)
    assert "<script" not in text
    page = Page(text)
    cells = [cell for row in page.rows for cell in row]
    assert cells.count(evil) >= 6
    assert f"Pooling search on {evil}" in page.text
