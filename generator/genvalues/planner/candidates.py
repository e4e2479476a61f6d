"""One tensor-parallel size on a number of nodes: its batch, its memory, and the rules it violates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from genvalues.accelerators import native_rules, neuron_rules
from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import CPU, Instance, of_same_service, trainium
from genvalues.accelerators.memory import BF16
from genvalues.accelerators.native_memory import native_memory
from genvalues.accelerators.neuron_rules import (
    SHARD_SIZE,
    TENSOR_PARALLEL,
    either,
    group_problems,
    query_key_value_problems,
)
from genvalues.accelerators.xla_memory import weights, xla_memory
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import KeyPath, number_of
from genvalues.planner.layout import Layout, Memory, Note, Refused, Run, Wishes

ACCUMULATION = 3  # default of backend xla; 12 rows per step on one trn1.32xlarge
STEP_ROWS = 12  # default of backend native on Trainium: as many micro-batches as a step of that many rows takes
CHECKPOINTING = ("selective", "full")  # tried in this order
GIB = 1 << 30
# Host memory of a worker: torch alone has 0.5 GiB resident (measured), torch-xla, NxD and the runtime more. Both
# numbers are assumptions; a quarter of a pod's memory is left for page cache and /dev/shm.
LIBRARIES_GIB = 3
HOST_SHARE = 0.75

(SIZE,) = key_paths(TENSOR_PARALLEL)
(SHARD,) = key_paths(SHARD_SIZE)
FEW_STEPS = 20  # fewer are worth a note: an assumption, as warm-up alone takes some
BATCH: KeyPath = ("training", "globalBatchSize")
MEMORY: KeyPath = ("instance",)


class Candidate(NamedTuple):
    """A tensor-parallel size and its problems. A problem's first key is the setting that could change instead."""

    size: int
    problems: tuple[Problem, ...]
    layout: Layout | None = None
    memory: Memory | None = None

    @property
    def works(self) -> bool:
        return not self.problems

    @property
    def blocked_by(self) -> set[KeyPath]:
        """The settings that prevent this size."""
        return {problem.keys[0] for problem in self.problems}

    @property
    def reasons(self) -> str:
        return "; ".join(problem.what for problem in self.problems)

    def reason(self, key: KeyPath) -> str:
        """Its first problem with that setting."""
        return next(problem.what for problem in self.problems if problem.keys[0] == key)


def candidate(
    run: Run, wishes: Wishes, architecture: Architecture | None, instance: Instance, nodes: int, size: int
) -> Candidate:
    """A size with its batch and memory, with the first of ``layouts`` that fits."""
    problems = list(group_problems(run.instance, size))
    if architecture:
        problems += layout_problems(run, architecture, instance, size)
    if nodes * instance.cores % size:
        return Candidate(size, tuple(problems))
    copies = nodes * instance.cores // size
    if run.backend == "native" and wishes.shard_size and copies % wishes.shard_size:
        what = f"{wishes.shard_size} does not divide {copies_of(copies)} of the model (tensorParallelSize {size})"
        problems.append(Problem((SHARD,), what, "Use a divisor."))
    try:
        per_device, accumulation = batch(run, wishes, copies)
    except Refused as refused:
        return Candidate(size, (*problems, *refused.problems))
    first = wishes.checkpointing or CHECKPOINTING[0]
    layout = Layout(nodes, instance.cores, size, copies, per_device, accumulation, first)
    sizes = shard_sizes(run, wishes, instance, layout)
    if architecture is None or problems:
        # The memory of an unknown model is not checked: share the weights as widely as possible.
        return Candidate(size, tuple(problems), layout._replace(shard_size=sizes[-1]))
    for tried in layouts(wishes, layout, sizes):
        counted = layout_memory(run, architecture, instance, tried)
        if counted.fits:
            return Candidate(size, (), tried, counted)
    too_large = Problem((MEMORY,), needs(counted, settings(run, tried)), "Use a larger instance.")
    return Candidate(size, (too_large,), tried, counted)


def length_problems(run: Run, architecture: Architecture, size: int = 1) -> Iterator[Problem]:
    """The backend's rules for row lengths, in groups of ``size``."""
    if run.backend == "native":
        yield from native_rules.length_problems(run.length, run.attention, "neuron", architecture)
    else:
        yield from neuron_rules.length_problems(architecture, run.length, run.attention, size)


def layout_problems(run: Run, architecture: Architecture, instance: Instance, size: int) -> Iterator[Problem]:
    """The backend's rules for a model in groups of ``size``."""
    yield from length_problems(run, architecture, size)
    if run.backend == "native":
        yield from native_rules.size_problems(architecture, size, instance.groups)
        return
    yield from neuron_rules.size_problems(architecture, size, instance.generation.target, instance.groups)
    yield from query_key_value_problems(architecture, run.targets, size)


def shard_sizes(run: Run, wishes: Wishes, instance: Instance, layout: Layout) -> list[int]:
    """The possible numbers of copies that share the base weights, in order; those of one node, where links are fast."""
    if run.backend == "xla":
        return [1]
    if wishes.shard_size:
        return [wishes.shard_size]
    most = instance.cores // layout.tensor_parallel
    return [size for size in instance.groups if size <= most and layout.data_parallel % size == 0]


def layouts(wishes: Wishes, layout: Layout, sizes: list[int]) -> Iterator[Layout]:
    """The layouts to try, in order: the least recomputation, then the fewest copies that share the base weights.

    Recomputing whole layers costs a third of the FLOPs of a step, gathering weights on one node less time.
    """
    for checkpointing in [wishes.checkpointing] if wishes.checkpointing else CHECKPOINTING:
        for size in sizes:
            yield layout._replace(checkpointing=checkpointing, shard_size=size)


def layout_memory(run: Run, architecture: Architecture, instance: Instance, layout: Layout) -> Memory:
    step, size = run.step(layout.per_device, layout.checkpointing), layout.tensor_parallel
    if run.backend == "native":
        several = layout.accumulation > 1
        return native_memory(architecture, step, size, layout.shard_size, instance.hbm, accumulates=several)
    return xla_memory(architecture, step, size, layout.data_parallel, instance.hbm)


def settings(run: Run, layout: Layout) -> str:
    """The settings of a layout that its memory depends on, for a message."""
    shard = f"shardSize {layout.shard_size} and " if run.backend == "native" else ""
    return f"{shard}activationCheckpointing {layout.checkpointing}"


def batch(run: Run, wishes: Wishes, copies: int) -> tuple[int, int]:
    """(rows per copy and micro-batch, micro-batches per step). Raises Refused where the wishes conflict."""
    per_device, accumulation, wanted = wishes.per_device, wishes.accumulation, wishes.global_batch
    if wanted is None:
        at_once = per_device or 1
        if accumulation is None:
            accumulation = default_accumulation(run, at_once * copies)
            while run.rows and accumulation > 1 and at_once * accumulation * copies > run.rows[1]:
                accumulation -= 1
        return at_once, accumulation
    at_once = per_device or (max(1, wanted // (copies * accumulation)) if accumulation else 1)
    each = at_once * copies * (accumulation or 1)
    if wanted % each == 0 and (accumulation is None or wanted == each):
        return at_once, accumulation or wanted // each
    factors = [f"{copies_of(copies)} of the model", f"perDeviceBatchSize {per_device or 1}"]
    if accumulation:
        factors.append(f"gradientAccumulationSteps {accumulation}")
    unit = (per_device or 1) * copies * (accumulation or 1)
    around = sorted({wanted // unit * unit, -(-wanted // unit) * unit} - {0})
    fitting = [unit] if accumulation and per_device else around
    relation = "is not" if accumulation and per_device else "is not divisible by"
    raise Refused(Problem((BATCH,), f"{wanted} {relation} {' x '.join(factors)}", f"Use {either(fitting)}."))


def default_accumulation(run: Run, rows: int) -> int:
    """Micro-batches of ``rows`` per step where the inputs set no batch."""
    on_trainium = run.instance != CPU and run.backend == "native"
    return min(ACCUMULATION, math.ceil(STEP_ROWS / rows)) if on_trainium else ACCUMULATION


def needs(counted: Memory, settings: str) -> str:
    parts = ", ".join(f"{name} {gib(number)}" for name, number in counted.summary.items())
    return f"needs {gib(counted.total)} GiB per core with {settings}, but a core has {gib(counted.hbm)} GiB ({parts})"


def gib(number: float) -> str:
    """``1.9``; below 0.95 with two significant digits, ``0.084``."""
    value = number / GIB
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def copies_of(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def host_memory_note(run: Run, architecture: Architecture, instance: Instance, size: int) -> Note | None:
    """A note where loading the model may exceed a pod's memory.

    Backend xla: each worker reads its part of the model. Native: each reads its shard from files that all share.
    """
    read = architecture.parameters if run.backend == "native" else instance.cores * weights(architecture, size)
    needed = BF16 * read / GIB + instance.cores * LIBRARIES_GIB
    if needed < HOST_SHARE * instance.request_memory_gib:
        return None
    text = (
        f"Loading the model takes about {needed:.0f} of the pod's {instance.request_memory_gib} GiB of host memory: "
        f"{instance.cores} workers, each with its part of the model and {LIBRARIES_GIB} GiB of libraries. This may not "
        "be enough."
    )
    return Note(("instance",), text, warns=False)  # an estimate that has not been measured


def too_few_rows(
    run: Run, wishes: Wishes, layout: Layout, rows: tuple[int, int] | None, cpu_processes: bool
) -> Note | None:
    """A note where a step takes more rows than the dataset has, at the key to change.

    ``cpu_processes``: the inputs set cpu.processes.
    """
    if rows is None or layout.global_batch <= rows[1]:
        return None
    happens = "rows repeat within a step"
    # With maxSteps rows repeat as needed; else the last step is padded (trainer, step_rows).
    total = None if run.max_steps is not None else max(1, round(rows[1] * run.epochs))
    if total is not None and layout.global_batch > total:
        happens = f"the run is a single step with {number_of(layout.global_batch - total, 'row')} of padding"
    key: KeyPath
    fix = "Use a smaller batch or more data"
    if wishes.global_batch:
        key = BATCH
    elif layout.accumulation > 1:
        key = ("training", "gradientAccumulationSteps")
    elif layout.per_device > 1:
        key = ("training", "perDeviceBatchSize")
    elif layout.nodes > 1:
        key, fix = ("nodes",), "Use fewer nodes or more data"
    elif cpu_processes:
        key, fix = ("cpu", "processes"), "Use fewer processes or more data"
    else:
        key, fix = ("dataset", "source"), "There are more copies of the model than rows; use more data"
        if run.backend == "native" and (fewer := fewer_copies(run, layout)):
            fix = f"There are more copies of the model than rows; {fewer}, or use more data"
    return Note(key, f"A step takes {layout.global_batch} rows and the dataset has {rows[1]}: {happens}. {fix}.")


def few_steps(run: Run, wishes: Wishes, layout: Layout, rows: tuple[int, int] | None) -> Note | None:
    """A note where the many cores of an instance leave a small dataset only a few optimizer steps (backend native).

    The batch of a step that the inputs set is theirs; else it has at least one row for each copy of the model.
    """
    if rows is None or wishes.global_batch or wishes.accumulation or run.max_steps or layout.global_batch > rows[1]:
        return None
    steps = math.ceil(max(1, round(rows[1] * run.epochs)) / layout.global_batch)
    fewer = fewer_copies(run, layout) if run.backend == "native" else ""
    if steps >= FEW_STEPS or not fewer:
        return None
    text = (
        f"{copies_of(layout.data_parallel)} of the model take {layout.global_batch} rows per step: "
        f"the run has only {number_of(steps, 'optimizer step')}. For more steps of fewer rows {fewer}."
    )
    return Note(("dataset", "source"), text)


def fewer_copies(run: Run, layout: Layout) -> str:
    """How to train with fewer copies of the model; empty for the smallest instance."""
    instance = trainium(run.instance)
    if instance is None:
        return ""
    smaller = [
        f"use instance {name}, which has {other.cores} cores"
        for name, other in of_same_service(run.instance).items()
        if other.generation is instance.generation and other.cores < instance.cores
    ]
    return f"{smaller[0]}, or a larger parallelism.tensorParallelSize" if smaller else ""
