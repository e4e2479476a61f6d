"""report.json and report.html of tokenize. Rows are hostile input to both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.conftest import Run

ANSWER = {"role": "assistant", "content": "Yes."}
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">&lt;\' \u202e'


class Tags(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.marked: list[str] = []
        self.framed: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self._open:
            self.marked.append(data)
        if "b" in self._open:
            self.framed.append(data)


@pytest.fixture
def reported(new_run: Callable[..., Run]) -> Callable[..., tuple[dict[str, Any], str]]:
    def run_with(rows: list[dict[str, Any]], **changes: Any) -> tuple[dict[str, Any], str]:
        run = new_run(**changes)
        Path(run.config["dataset"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        run("tokenize")
        folder = run.workspace / run.manifest("tokenize")["facts"]["dataset"]
        return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()

    return run_with


def test_hostile_rows_are_only_text_in_the_page(reported: Callable[..., tuple[dict[str, Any], str]]) -> None:
    rows = [{"q": HOSTILE, "a": f"{number} {HOSTILE}"} for number in range(9)] + [{"q": HOSTILE, "a": ""}]
    report, html = reported(rows, training={"maxSequenceLength": 512})
    page = Tags()
    page.feed(html)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "form", "a"}
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"url\(|@import", html) and "default-src 'none'" in html
    assert page.text.count("<script>alert(1)</script>") >= 3 + 3 + 1, (
        "of three examples, twice each, and the dropped row"
    )
    assert report["dropped_shown"]["empty output"][0]["row"] in page.text


def test_half_a_surrogate_pair_in_a_dropped_row_is_shown_as_an_escape(
    reported: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    report, html = reported([{"q": f"{number}?", "a": "Yes."} for number in range(9)] + [{"q": "?", "a": "\ud800"}])
    [shown] = report["dropped_shown"]["is not valid Unicode"]
    assert json.loads(shown["row"])["a"] == "\ud800" and "\\ud800" in html


def test_the_page_has_the_notes(reported: Callable[..., tuple[dict[str, Any], str]]) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}", "mood": "<b>"}, ANSWER]} for n in range(9)]
    report, html = reported(rows, dataset={"format": "chat", "columns": {}})
    assert report["notes"] == {"ignored key mood: the chat template does not read it": 9}
    assert "ignored key mood" in html


def test_reasons_that_rows_make_up_take_a_bounded_part_of_the_report(
    reported: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    user = {"role": "user", "content": "?"}
    rows = [{"messages": [{**user, "content": f"{n}?", f"key {n}": 1}, ANSWER]} for n in range(1000)]
    report, _ = reported(rows, dataset={"format": "chat", "columns": {}})
    assert len(report["notes"]) == 101 and sum(report["notes"].values()) == 1000


def test_the_mask_is_marked_and_special_tokens_are_framed(
    reported: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    _, html = reported([{"q": f"{number}?", "a": f"Answer {number}."} for number in range(10)])
    page = Tags()
    page.feed(html.partition("Examples as the model sees them")[2].partition("</p>")[2])
    assert [text for text in page.marked if text.startswith("Answer")] == page.marked[::2]
    assert set(page.marked[1::2]) == {"<|end|>"} and len(page.marked) == 6
    assert set(page.framed) == {"<|start|>", "<|end|>"}


def test_the_report_has_lengths_places_and_the_template(reported: Callable[..., tuple[dict[str, Any], str]]) -> None:
    rows = [{"q": "?", "a": "x" * 39 + str(number // 2)} for number in range(10)] + [{"q": "Short", "a": ""}] * 5
    report, html = reported(rows, training={"maxSequenceLength": 512})
    # <|start|>user\n?<|end|>\\n<|start|>assistant\\n, 40 bytes, <|end|>\\n: 62 tokens
    assert report["histogram"] == [{"up_to": 64, "examples": 10}]
    assert report["dropped"] == {"empty output": 5}
    shown = report["dropped_shown"]["empty output"]
    assert [row["place"].rpartition(":")[2] for row in shown] == ["11", "12", "13"]
    assert json.loads(shown[0]["row"]) == {"q": "Short", "a": ""}
    assert report["template"]["name"] == "the tokenizer's chat template"
    assert re.fullmatch("[0-9a-f]{16}", report["template"]["sha256"]) and report["template"]["sha256"] in html
    assert report["duplicates"] == 5
    assert 0 < 1 - report["train"]["mask_share"] < 1
