"""The report in a browser: readable at 360 pixels and in both color schemes, silent, and without any request."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from browser.chromium import CHROMIUM, DARK, LIGHT, show
from trainer.report_facts import ATTACKS, data_of, hostile_facts, plain_facts

pytest.importorskip("torch", reason="needs the trainer's packages")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install --no-install-recommends chromium")


def page(kind: str) -> str:
    """The report of a plain or a hostile run, or the data report of hostile rows."""
    from llama_lora.data import data_report
    from llama_lora.report.html import encode
    from llama_lora.report.page import page

    pages = {
        "plain": lambda: page(plain_facts()),
        "hostile": lambda: page(hostile_facts()),
        "data": lambda: data_report.page(data_of(" ".join(ATTACKS))),
    }
    return encode(pages[kind]()).decode()


@pytest.mark.parametrize(
    ("kind", "width", "scheme"),
    [
        ("plain", 360, LIGHT),
        ("plain", 1100, DARK),
        ("hostile", 360, DARK),
        ("hostile", 1100, LIGHT),
        ("data", 360, LIGHT),
    ],
)
def test_the_page_fits_says_nothing_and_requests_nothing(kind: str, width: int, scheme: int, tmp_path: Path) -> None:
    shown = show(page(kind), tmp_path, width, scheme)
    assert shown.found["clientWidth"] == width
    assert shown.found["scrollWidth"] <= width and not shown.found["wide"]
    assert shown.console == [] and shown.found["attacked"] == ""
    assert not [url for url in shown.urls if "example" in url]
    if kind != "data":
        assert shown.found["small"] >= 9, "labels of charts can be read on a phone"


def test_the_page_follows_the_screens_color_scheme(tmp_path: Path) -> None:
    brightness = {}
    for name, scheme in (("light", LIGHT), ("dark", DARK)):
        found = show(page("plain"), tmp_path, 360, scheme).found
        brightness[name] = [sum(map(int, re.findall(r"\d+", found[part])[:3])) for part in ("background", "color")]
    assert brightness["light"][0] > 600 > 200 > brightness["light"][1]
    assert brightness["dark"][0] < 200 < 600 < brightness["dark"][1]


def test_an_attack_would_be_noticed(tmp_path: Path) -> None:
    """Without the policy and the escaping the other tests would fail."""
    attack = "<!doctype html><script>attacked = 1; console.error(2)</script><img src=https://tracker.example/x>"
    attack += "<p style=width:500px>x"
    shown = show(attack, tmp_path, 360)
    assert shown.found["attacked"] == "1" and shown.found["wide"]
    assert shown.console and [url for url in shown.urls if "example" in url]
