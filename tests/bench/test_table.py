"""The table of `make bench`, from results that are given here. Nothing is timed."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from bench.table import BEGIN, END, Goal, Line, Result, figure, markdown, misses, text, with_table

VERSIONS = {"peft": "0.17.0", "torch": "2.8.0"}
TIME = Line("merge-time", "merge", "s", Goal(0.5), "peft", reason="it waits for the disk")
SPEED = Line("train", "train", "tokens/s", Goal(1.3, least=True), "peft")
ALONE = Line("skip", "skip a stage", "s", Goal(0.3), of_ours=True)


def result(ours: list[float], theirs: list[float], **more: object) -> Result:
    return Result(ours, theirs, **{"versions": VERSIONS, "machine": "2 cores", "date": "2026-11-29", **more})  # type: ignore[arg-type]


def test_the_figure_is_the_median_of_the_ratios_of_pairs_with_their_range() -> None:
    assert figure(TIME, result([1.0, 9.0, 2.0], [2.0, 10.0, 8.0])) == "0.5 (0.25 to 0.9)"
    assert figure(ALONE, result([0.2, 0.4, 0.3], [])) == "0.3 s (0.2 to 0.4)"


@pytest.mark.parametrize(
    ("line", "ours", "missed"),
    [(TIME, 5.0, False), (TIME, 5.1, True), (SPEED, 13.0, False), (SPEED, 12.9, True), (ALONE, 0.31, True)],
)
def test_a_goal_is_a_limit_of_the_figure_in_its_direction(line: Line, ours: float, missed: bool) -> None:
    assert misses(line, result([ours], [10.0])) is missed


def test_a_line_below_its_goal_says_so_with_its_reason_and_both_sides() -> None:
    said = text(TIME, result([6.0], [10.0], others=0.7))
    assert "below goal: it waits for the disk" in said
    for part in ("0.6", "goal at most 0.5", "ours 6 s", "peft 0.17.0: 10 s", "busy: other work took 0.7 cores"):
        assert part in said
    assert "below goal" not in text(TIME, result([4.0], [10.0]))


def test_lines_of_different_days_and_machines_stand_in_one_table() -> None:
    later = result([0.4], [], date="2026-12-01", machine="16 cores", versions={})
    table = markdown([TIME, SPEED, ALONE], {"merge-time": result([6.0], [10.0]), "skip": later}).splitlines()
    assert len({row.count("|") for row in table[:5]}) == 1, "every row has all columns"
    assert "2026-11-29 [1]" in table[2] and "**below goal**: at most 0.5" in table[2]
    assert table[3].endswith("| not measured |")
    assert "2026-12-01 [2]" in table[4]
    assert "- `merge-time`: it waits for the disk" in table
    assert table[-2].startswith("[1] 2 cores, peft 0.17.0, torch 2.8.0") and table[-1].startswith("[2] 16 cores")


def test_the_table_replaces_only_what_is_between_the_marks_and_a_result_survives_its_file() -> None:
    page = f"# Before\n\n{BEGIN}\nold \\1\n{END}\nafter\n"
    assert with_table(page, r"new \1") == f"# Before\n\n{BEGIN}\n\nnew \\1\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="no marks"):
        with_table("# Before\n", "new")
    assert Result(**asdict(result([1.0], [2.0]))) == result([1.0], [2.0])
