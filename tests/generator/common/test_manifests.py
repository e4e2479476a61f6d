"""A stage's manifest as one line of its log: short whatever it contains, and readable again."""

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


def round_trip(folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return the log line of a manifest, and the manifest parsed from a log with that line."""
    file = folder / "merge.json"
    file.write_text(json.dumps({**MANIFEST, **changes}))
    line = line_of(file)
    assert "\n" not in line
    found = manifests_in(f"2026-01-01T00:00:00.1Z one\n2026-01-01T00:00:00.2Z {line}\n2026-01-01T00:00:00.3Z two\n")
    assert found == manifests_in(line)
    return line, found["merge"]


def test_a_log_line_contains_what_a_bug_report_needs(tmp_path: Path) -> None:
    _, found = round_trip(tmp_path)
    kept = {key: value for key, value in MANIFEST.items() if key != "outputs"}
    assert found == {**kept, "files": 2, "bytes": 12, "outputs": {"runs/r/merged/config.json": 7, "x": 5}}


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": {f"runs/r/{number}": {"bytes": 1} for number in range(5000)}},
        {"outputs": {f"{'long' * 300}{number}": {"bytes": 1} for number in range(9)}},
        {"facts": {"samples": ["an answer\n" * 9] * 999, "loss": 1.5}},
        {"facts": {str(number): "x" * 900 for number in range(99)}},
        {"versions": {str(number): "x" * 900 for number in range(99)}},
    ],
)
def test_a_long_manifest_gives_a_short_line_with_its_fingerprint_and_totals(tmp_path: Path, changes: Any) -> None:
    line, found = round_trip(tmp_path, **changes)
    assert len(line) < LINE_LENGTH + 100
    outputs = {**MANIFEST, **changes}["outputs"]
    assert found["fingerprint"] == MANIFEST["fingerprint"]
    assert (found["files"], found["bytes"]) == (len(outputs), sum(one["bytes"] for one in outputs.values()))


def test_only_the_first_outputs_are_named_but_all_are_counted(tmp_path: Path) -> None:
    _, found = round_trip(tmp_path, outputs={f"{number:02}": {"bytes": number} for number in range(30)})
    assert list(found["outputs"]) == [f"{number:02}" for number in range(20)] and found["files"] == 30


def test_a_long_fact_is_replaced_by_its_length_and_the_others_are_kept(tmp_path: Path) -> None:
    _, found = round_trip(tmp_path, facts={"samples": "x" * 5000, "loss": 1.5})
    assert "5002 characters" in found["facts"]["samples"] and found["facts"]["loss"] == 1.5


def test_lines_that_only_look_like_a_manifest_are_ignored() -> None:
    deep = '{"a":' * 99_999 + "1" + "}" * 99_999
    for what in ("{}", '{"stage":"merge"', '{"stage":"train"}', '{"stage":"merge"}}', deep):
        assert manifests_in(f"merge: manifest {what}\n") == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"stage": "x"}', '{"stage": "x", "outputs": []}'])
def test_a_file_that_is_not_a_manifest_gives_no_line_and_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    assert line_of(tmp_path / "m.json") == ""
    assert line_of(tmp_path / "nowhere.json") == ""
