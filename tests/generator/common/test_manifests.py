"""A stage's manifest as a line of its log: short whatever it holds, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genvalues.common.manifests import LINE_LENGTH, line_of, manifests_in

MANIFEST: dict[str, Any] = {
    "stage": "merge",
    "fingerprint": "a1" * 32,
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:01:00+00:00",
    "outputs": {"runs/r/merged/config.json": {"bytes": 7, "sha256": "b2" * 32}, "x": {"bytes": 5, "sha256": "c3" * 32}},
    "versions": {"torch": "2.8.0"},
    "facts": {"probe": {"losses": [1.5, 2.5]}},
}


def told(folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """The line, and what is read from it among others."""
    file = folder / "merge.json"
    file.write_text(json.dumps({**MANIFEST, **changes}))
    line = line_of(file)
    assert "\n" not in line
    found = manifests_in(f"2026-01-01T00:00:00.1Z one\n2026-01-01T00:00:00.2Z {line}\n2026-01-01T00:00:00.3Z two\n")
    assert found == manifests_in(line)
    return line, found["merge"]


def test_what_a_bug_report_needs_of_it_is_read_again_from_a_log(tmp_path: Path) -> None:
    _, found = told(tmp_path)
    kept = {key: value for key, value in MANIFEST.items() if key != "outputs"}
    assert found == {**kept, "files": 2, "bytes": 12, "outputs": {"runs/r/merged/config.json": 7, "x": 5}}


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": {f"runs/r/{number}": {"bytes": 1} for number in range(5000)}},
        {"outputs": {f"{'long' * 300}{number}": {"bytes": 1} for number in range(9)}},
        {"facts": {"samples": ["what was said\n" * 9] * 999, "loss": 1.5}},
        {"facts": {str(number): "x" * 900 for number in range(99)}},
        {"versions": {str(number): "x" * 900 for number in range(99)}},
    ],
)
def test_a_long_one_is_a_short_line_that_still_says_which_and_how_much(tmp_path: Path, changes: Any) -> None:
    line, found = told(tmp_path, **changes)
    assert len(line) < LINE_LENGTH + 100
    outputs = {**MANIFEST, **changes}["outputs"]
    assert found["fingerprint"] == MANIFEST["fingerprint"]
    assert (found["files"], found["bytes"]) == (len(outputs), sum(one["bytes"] for one in outputs.values()))


def test_of_many_outputs_some_are_named_and_all_are_counted(tmp_path: Path) -> None:
    _, found = told(tmp_path, outputs={f"{number:02}": {"bytes": number} for number in range(30)})
    assert list(found["outputs"]) == [f"{number:02}" for number in range(20)] and found["files"] == 30


def test_a_long_fact_says_so_and_leaves_the_others(tmp_path: Path) -> None:
    _, found = told(tmp_path, facts={"samples": "x" * 5000, "loss": 1.5})
    assert found["facts"] == {"samples": "(left out: 5002 characters)", "loss": 1.5}


def test_what_only_looks_like_one_in_a_log_is_left_where_it_is() -> None:
    deep = '{"a":' * 99_999 + "1" + "}" * 99_999
    for what in ("{}", '{"stage":"merge"', '{"stage":"train"}', '{"stage":"merge"}}', deep):
        assert manifests_in(f"merge: manifest {what}\n") == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"stage": "x"}', '{"stage": "x", "outputs": []}'])
def test_what_is_no_manifest_gives_no_line_and_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    assert line_of(tmp_path / "m.json") == ""
    assert line_of(tmp_path / "nowhere.json") == ""
