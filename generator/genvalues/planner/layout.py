"""What goes into planning and what comes out of it: the types that the modules of this package share."""

from __future__ import annotations

from typing import NamedTuple

from genvalues.accelerators.memory import Step
from genvalues.accelerators.native_memory import NativeMemory
from genvalues.accelerators.xla_memory import XlaMemory
from genvalues.common.problems import Problem
from genvalues.common.text import KeyPath

FROM_INPUTS = "set in the inputs"  # the reason for a choice that the inputs make
Memory = XlaMemory | NativeMemory


class Wishes(NamedTuple):
    """The choices that the inputs make; None: planned."""

    backend: str | None = None
    nodes: int | None = None
    tensor_parallel: int | None = None
    shard_size: int | None = None
    max_hours: float | None = None
    per_device: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    checkpointing: str | None = None


class Run(NamedTuple):
    """The settings that planning does not choose. ``rows`` are (fewest, most) per epoch, where known."""

    instance: str
    backend: str  # native or xla
    length: int
    attention: str
    r: int
    targets: tuple[str, ...]
    dropout: bool
    rows: tuple[int, int] | None = None
    rows_unknown: str = ""  # why
    epochs: float = 1.0
    max_steps: int | None = None
    eval_steps: int | None = None  # between measurements of the held-out loss
    eval_rows: int = 0
    compile_on_cpu: bool = False
    cpu_processes: int = 2

    def step(self, per_device: int, checkpointing: str) -> Step:
        return Step(self.length, per_device, self.attention, checkpointing, self.r, self.targets, self.dropout)


class Layout(NamedTuple):
    """How the processes share the work, and how many rows an optimizer step has."""

    nodes: int
    processes_per_node: int
    tensor_parallel: int
    data_parallel: int
    per_device: int
    accumulation: int
    checkpointing: str
    shard_size: int = 1  # copies that share the base model's weights

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step."""
        return self.per_device * self.accumulation * self.data_parallel


class Choice(NamedTuple):
    """A key of the inputs (or a consequence of one), its value and the reason. ``wished``: the inputs set it."""

    key: str
    value: str | int | float
    reason: str
    wished: bool = False


class Rejection(NamedTuple):
    """An alternative and why it is not chosen. ``possible``: it would work."""

    key: str
    value: str | int | float
    reason: str
    possible: bool = False


class Note(NamedTuple):
    """A remark on a plan and the key it concerns. ``warns``: `check` and `write` print it as a warning."""

    key: KeyPath
    text: str
    warns: bool = True


class Refused(Exception):
    """No layout satisfies the inputs."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.what for problem in problems))
        self.problems = problems


class Chosen(NamedTuple):
    layout: Layout
    choices: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    memory: Memory | None
    notes: tuple[Note, ...] = ()


def choice(key: str, value: str | int | float, wish: object, reason: str) -> Choice:
    """A choice with its reason, or FROM_INPUTS where there is a wish."""
    return Choice(key, value, FROM_INPUTS if wish else reason, wished=bool(wish))
