"""How the cost of a stage grows with its work: 4 and 16 times of it, against 4 and 16 times the cost of once.

Both are measured without imports, in a process each.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.measure import Bench, Measured, Sides, alternate, call, inner
from bench.table import Goal, Line

TIMES = (1, 4, 16)
AT_MOST = Goal(1.15)  # of linear; the noise of a machine is some percent


class Size(NamedTuple):
    """Functions of a module that make the input of a size in a folder, and do the work; ``once``: the smallest size."""

    module: str
    make: str
    work: str
    once: int


def growth(name: str, work: str, unit: str, size: Size) -> Bench:
    """The lines NAME-growth-4 and NAME-growth-16."""

    def measure(folder: Path) -> dict[str, Sides]:
        for times in TIMES:
            call(size.module, size.make, folder, times * size.once)

        def side(times: int) -> Measured:
            return call(size.module, size.work, folder, times * size.once)

        sides = {str(times): lambda output, times=times: side(times) for times in TIMES}
        return linear(name, alternate(folder, sides))

    return Bench(growth_lines(name, work, unit, size.once), measure)


def growth_lines(name: str, work: str, unit: str, once: int) -> list[Line]:
    return [
        Line(
            f"{name}-growth-{times}",
            f"{work}: {times * once:,} {unit} against {times} times the time of {once:,}",
            "s",
            AT_MOST,
            "linear growth",
        )
        for times in TIMES[1:]
    ]


def linear(name: str, found: dict[str, list[Measured]]) -> dict[str, Sides]:
    """The sides of growth's lines, from rounds named by their times."""
    once = [inner(each) for each in found["1"]]
    return {
        f"{name}-growth-{times}": Sides([inner(each) for each in found[str(times)]], [times * each for each in once])
        for times in TIMES[1:]
    }
