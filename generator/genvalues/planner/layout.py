"""What is wished, what is given and what comes out of planning: the words that the modules of this package share."""

from __future__ import annotations

from typing import NamedTuple

from genvalues.accelerators.memory import Memory, Step
from genvalues.common.text import KeyPath


class Wishes(NamedTuple):
    """What the inputs say; None: to be chosen."""

    nodes: int | None = None
    tensor_parallel: int | None = None
    max_hours: float | None = None
    per_device: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    checkpointing: str | None = None


class Run(NamedTuple):
    """What is given: the settings that nothing is chosen about. ``rows`` are fewest and most, where they are known."""

    instance: str
    length: int
    attention: str
    r: int
    targets: tuple[str, ...]
    dropout: bool
    rows: tuple[int, int] | None = None
    cpu_processes: int = 2

    def step(self, per_device: int, checkpointing: str) -> Step:
        return Step(self.length, per_device, self.attention, checkpointing, self.r, self.targets, self.dropout)


class Layout(NamedTuple):
    """How the processes divide the work, and how many rows a step has."""

    nodes: int
    processes_per_node: int
    tensor_parallel: int
    data_parallel: int
    per_device: int
    accumulation: int
    checkpointing: str

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device * self.accumulation * self.data_parallel


class Choice(NamedTuple):
    """A key of the inputs (or what follows from them), its value, and why. ``wished``: the inputs say so."""

    key: str
    value: str | int | float
    reason: str
    wished: bool = False


class Rejection(NamedTuple):
    """An alternative, and the rule that it breaks or why another is better. ``possible``: it would work."""

    key: str
    value: str | int | float
    rule: str
    possible: bool = False


class Problem(NamedTuple):
    """A wish that cannot work, or a run that cannot: where, why, and what to write instead."""

    key: KeyPath
    what: str
    fix: str


class Note(NamedTuple):
    """What to know of a plan, and the key it is about. ``warns``: where values are written, too."""

    key: KeyPath
    text: str
    warns: bool = True


class Refused(Exception):
    """There is no layout for the wishes."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.what for problem in problems))
        self.problems = problems


class Chosen(NamedTuple):
    layout: Layout
    choices: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    memory: Memory | None
    notes: tuple[Note, ...] = ()
