"""The parts of report.html: charts, differences, and a page that no text can break out of. tests/browser shows it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_lora.report import charts, differences
from llama_lora.report.charts import Series, chart, smoothed, thinned, ticks
from llama_lora.report.facts import node_hours
from llama_lora.report.html import LONGEST_TEXT, encode
from llama_lora.report.page import MOST_SAMPLES, page
from llama_lora.verdict import Verdict
from trainer.conftest import Run
from trainer.report_facts import hostile_facts, plain_facts

ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "section",
        "article",
        "div",
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
    ),
    *("table", "tr", "th", "td", "pre", "code", "b", "i", "strong", "small", "span", "mark", "ins", "del", "details"),
    *("summary", "figure", "figcaption", "svg", "path", "text", "circle"),
}


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def visible(text: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL).split())


@pytest.mark.parametrize("facts", [plain_facts(), hostile_facts()], ids=["plain", "hostile"])
def test_the_page_loads_nothing_and_runs_nothing_whatever_the_rows_say(facts: Any) -> None:
    elements = Elements(encode(page(facts)).decode()).found
    assert {tag for tag, _ in elements} <= ALLOWED
    names = {name for _, attributes in elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "action", "srcset")]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in elements
    assert [attributes["http-equiv"] for _, attributes in elements if "http-equiv" in attributes] == [
        "Content-Security-Policy"
    ]
    assert [tag for tag, _ in elements].count("style") == 1 and "url(" not in charts.STYLE
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in elements


def test_the_page_begins_with_the_verdict_and_has_every_section() -> None:
    text = visible(page(plain_facts()))
    parts = ["Better: held-out loss is 0.31 lower (95 % interval 0.28 to 0.34, 256 rows)", "Held-out loss", "Training"]
    parts += ["Loss", "Learning rate", "Gradient norm", "Speed", "Answers", "Data", "Stages and cost", "Provenance"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "$53.75" in text and "2.50 node hours at $21.5" in text and "CPU run" not in text
    assert "stopped early, lowest held-out loss at 160" in text and "1 h 14 min" in text
    assert "CPU run" in visible(page(plain_facts(on_cpu=True)))


@pytest.mark.parametrize(("word", "style"), [("better", "better"), ("no difference", "difference"), ("worse", "worse")])
def test_the_verdict_has_its_color(word: Any, style: str) -> None:
    assert f'<div class="verdict {style}">' in page(plain_facts(verdict=Verdict(word, 0.1, 0.05, 0.2, 50)))


def test_a_run_with_as_little_as_possible_has_a_page() -> None:
    bare: dict[str, Any] = dict.fromkeys(("metrics", "held_out", "samples", "stages"), ())
    bare |= {key: {} for key in ("training", "data", "settings", "sources", "versions", "fingerprints", "digests")}
    text = visible(page(plain_facts(**bare, node_hours=None, price=None)))
    assert "Fewer than two steps" in text and "Answers" not in text


def test_long_texts_and_many_samples_are_cut_and_counted() -> None:
    long = {"prompt": "x" * (LONGEST_TEXT + 12), "reference": "", "base": "y " * LONGEST_TEXT, "merged": "z"}
    text = page(plain_facts(samples=[long] * (MOST_SAMPLES + 3)))
    assert "(12 characters more)" in text and "3 more in evaluation/samples.json" in text
    assert text.count("<article") == MOST_SAMPLES and len(text) < MOST_SAMPLES * 2.2 * LONGEST_TEXT + 100_000


@given(st.text(max_size=60), st.text(max_size=60))
def test_marked_texts_are_the_texts(before: str, after: str) -> None:
    import html

    for text, shown in zip((before, after), differences.marked(before, after), strict=True):
        assert html.unescape(re.sub("</?(ins|del)>", "", shown)) == html.unescape(html.escape(text))
        assert "<" not in re.sub("</?(ins|del)>", "", shown)


def test_differences_are_marked_by_word_and_equal_texts_are_not() -> None:
    base, merged = differences.marked("It is a cat.", "It was a cat!")
    assert base == "It <del>is </del>a cat<del>.</del>" and merged == "It <ins>was </ins>a cat<ins>!</ins>"
    assert differences.marked("a & b", "a & b") == ("a &amp; b", "a &amp; b")
    many = "word " * (differences.MOST_WORDS + 1)
    assert differences.marked(many, "<other>") == (many, "&lt;other&gt;")


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    slack = 1e-6 * max(abs(low), width)
    assert len(found) <= 7 and all(low - slack <= tick <= low + width + slack for tick in found)


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(step), 1.0 + (100.0 if step == 7777 else 0.0)) for step in range(50_000)]
    found = thinned(points)
    assert len(found) <= charts.MOST_POINTS + 2 and max(found, key=lambda point: point[1]) == (7777.0, 101.0)
    assert found[0] == points[0] and found[-1] == points[-1] and found == sorted(found)
    assert len(chart("Loss", "", [Series("x", points)], wide=True)) < 40_000


def test_smoothing_keeps_a_constant_and_lowers_noise() -> None:
    flat = [(float(step), 2.0) for step in range(100)]
    assert [value for _, value in smoothed(flat)] == pytest.approx([2.0] * 100)
    noisy = smoothed([(float(step), 2.0 + (-1) ** step) for step in range(400)])
    assert all(abs(value - 2) < 0.1 for _, value in noisy[20:-20])


def test_a_chart_has_its_lines_inside_and_tells_of_each_held_out_point() -> None:
    svg = chart(
        "Loss", "nats", [Series("loss", [(1, 3.0), (9, 1.0)]), Series("held out", [(0, 3.5), (9, 1.5)], "dots", 9)]
    )
    assert "<title>step 0: 3.5000</title>" in svg and "step 9: 1.5000, the lowest" in svg
    for line in re.findall(r'<path class="(?:line|dots)" d="M([^"]+)"', svg):
        for x, y in (map(float, pair.split()) for pair in line.split("L")):
            assert charts.LEFT <= x <= charts.NARROW - charts.RIGHT and charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    assert chart("Loss", "", [Series("loss", [(1, 3.0)])]) == ""
    assert "nan" not in chart("Flat", "", [Series("x", [(1, 0.0), (2, 0.0)])], from_zero=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, (None, None)),
        ("[]", (None, None)),
        ('{"pods": {"a": {"since": 0, "until": 3600}, "b": {"since": 0, "until": 1800}}}', (1.5, None)),
        ('{"pods": {"a": {"since": 0, "until": 3600}}, "pricePerNodeHour": 20}', (1.0, 20)),
        ('{"pods": {"a": {"since": 0, "until": 3600}}, "sha256": "of other content"}', (None, None)),
        ('{"pods": {"a": {"since": "x"}}}', (None, None)),
        ('{"pods": ' + "[" * 5000, (None, None)),
    ],
)
def test_the_cost_is_that_of_costs_json_where_it_is_valid(
    finished_run: Run, content: str | None, expected: tuple[float | None, float | None]
) -> None:
    if content is not None:
        (finished_run.paths.run / "costs.json").write_text(content)
    assert node_hours(finished_run.paths) == expected


def test_the_report_of_a_run_has_its_losses_stages_and_digests(whole_run: Run) -> None:
    text = visible(whole_run.paths.report.read_text())
    result = json.loads((whole_run.paths.evaluation / "eval.json").read_text())
    assert result["verdict"]["sentence"].partition(": ")[2] in text
    assert "CPU run" in text and math.isfinite(result["base"]["loss"])
    for stage in ("tokenize", "compile", "train", "consolidate", "merge", "evaluate"):
        assert f" {stage} " in text
    for output in whole_run.manifest("merge")["outputs"].values():
        assert output["sha256"] in text
    assert whole_run.manifest("train")["fingerprint"] in text and "rows read 40" in text


def test_the_report_comes_whole_out_of_a_pods_log(finished_run: Run) -> None:
    from genvalues.common.log_file import content_of

    said = finished_run("report").splitlines()
    assert content_of(["a line before", *said, "one after"]) == finished_run.paths.report.read_bytes()
    assert max(map(len, said)) < 200
    finished_run.paths.report.write_text("changed")
    assert "another SHA-256" in finished_run("report", status=2)
    finished_run.paths.report.unlink()
    assert "report.html: not found" in finished_run("report", status=2)
    finished_run.paths.manifest("evaluate").unlink()
    assert "evaluate has not ended" in finished_run("report", status=2)


@pytest.mark.parametrize("held_out", ["x", [1], -1, {"best_step": "x"}, {"best_step": [1]}, None])
def test_a_result_of_any_content_gives_a_page(held_out: Any) -> None:
    """train's manifest is a file on the volume."""
    text = visible(page(plain_facts(training={"steps": [1], "stopped_early": True, "held_out": held_out})))
    assert "stopped early" in text and "lowest held-out loss at" not in text


@pytest.mark.parametrize("data", [{"kept": "x"}, {"train": None}, {"examples": 3, "dropped_shown": 7}])
def test_a_data_report_that_lacks_keys_is_left_out(data: dict[str, Any]) -> None:
    text = page(plain_facts(data=data))
    assert "<h2>Data</h2>" not in text and "<h2>Provenance</h2>" in text
