"""The table of `make bench`: lines, their goals and results, as text and as Markdown. No input, no output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

BEGIN, END = "<!-- make bench writes from here -->", "<!-- to here -->"
BUSY = 0.2  # cores that other work may take before a result is marked as busy


@dataclass(frozen=True)
class Goal:
    """A limit of the median figure."""

    limit: float
    least: bool = False  # at least the limit, not at most

    def is_met(self, figure: float) -> bool:
        return figure >= self.limit if self.least else figure <= self.limit

    def __str__(self) -> str:
        return f"{'at least' if self.least else 'at most'} {number(self.limit)}"


@dataclass(frozen=True)
class Line:
    """A comparison. Its figure is ours / theirs, or ours alone, in ``unit``, if ``of_ours``.

    ``against`` is the package or command on the other side; ``reason`` says why the goal is missed, for when it is.
    """

    name: str
    work: str
    unit: str
    goal: Goal
    against: str = ""
    reason: str = ""
    of_ours: bool = False


@dataclass(frozen=True)
class Result:
    """The values of both sides in each round. ``others``: cores that other work took meanwhile."""

    ours: list[float]
    theirs: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    date: str = ""
    others: float = 0.0

    def figures(self, line: Line) -> list[float]:
        if line.of_ours:
            return self.ours
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def setting(self) -> str:
        """The machine and the libraries."""
        return ", ".join([self.machine, *(f"{name} {version}" for name, version in sorted(self.versions.items()))])


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure(line: Line, result: Result) -> str:
    """The median and the range, such as `0.58 (0.55 to 0.61)`."""
    found = result.figures(line)
    unit = f" {line.unit}" if line.of_ours else ""
    return f"{number(median(found))}{unit} ({number(min(found))} to {number(max(found))})"


def misses(line: Line, result: Result) -> bool:
    return not line.goal.is_met(median(result.figures(line)))


def side(values: list[float], unit: str) -> str:
    return f"{number(median(values))} {unit}" if values else ""


def other_side(line: Line, result: Result) -> str:
    """`peft 0.17.0: 10.9 s`."""
    named = f"{line.against} {result.versions.get(line.against, '')}".strip()
    return f"{named}: {side(result.theirs, line.unit)}" if result.theirs else named


def busy(result: Result) -> str:
    return f"busy: other work took {number(result.others)} cores" if result.others > BUSY else ""


def text(line: Line, result: Result) -> str:
    """The result of a line for a terminal."""
    parts = [f"{line.name}: {figure(line, result)}", f"goal {line.goal}"]
    if misses(line, result):
        parts.append("below goal" + (f": {line.reason}" if line.reason else ""))
    sides = [f"ours {side(result.ours, line.unit)}"] * (not line.of_ours) + [other_side(line, result), busy(result)]
    return "; ".join([*parts, *filter(None, sides)])


def markdown(lines: Iterable[Line], results: Mapping[str, Result]) -> str:
    """The table of all lines, the reasons of those below their goal, and the machines."""
    rows, reasons, settings = [], [], list[str]()
    for line in lines:
        result = results.get(line.name)
        if result is None:
            rows.append([f"`{line.name}`", line.work, "", line.against, "", str(line.goal), "not measured"])
            continue
        if result.setting not in settings:
            settings.append(result.setting)
        measured = f"{result.date} [{settings.index(result.setting) + 1}]"
        goal = f"**below goal**: {line.goal}" if misses(line, result) else str(line.goal)
        if misses(line, result) and line.reason:
            reasons.append(f"- `{line.name}`: {line.reason}")
        shown = side(result.ours, line.unit)
        cells = [shown, other_side(line, result), figure(line, result), goal]
        rows.append([f"`{line.name}`", line.work, *cells, ", ".join(filter(None, [measured, busy(result)]))])
    head = ["line", "work", "this project", "against", "figure (range)", "goal", "measured"]
    table = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    table.insert(1, "|---" * len(head) + "|")
    notes = [f"[{index}] {setting}  " for index, setting in enumerate(settings, 1)]
    below = ["", "Below goal:", "", *reasons] if reasons else []
    return "\n".join([*table, *below, "", *notes]).rstrip()


def with_table(page: str, table: str) -> str:
    """The page with the table between its marks. Raises ValueError if it has none."""
    if not re.search(f"{BEGIN}.*{END}", page, re.DOTALL):
        raise ValueError(f"the page has no marks {BEGIN} and {END}")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL)
