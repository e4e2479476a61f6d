"""One tensor-parallel size on a number of nodes: its batch, its memory, and the rules it violates."""

from __future__ import annotations

from typing import NamedTuple

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import BF16, Memory, memory, weights
from genvalues.accelerators.neuron_rules import (
    TENSOR_PARALLEL,
    either,
    group_problems,
    length_problems,
    query_key_value_problems,
    size_problems,
)
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import KeyPath, number_of
from genvalues.planner.layout import Layout, Note, Refused, Run, Wishes

ACCUMULATION = 3  # default; 12 rows per step on one trn1.32xlarge
CHECKPOINTING = ("selective", "full")  # tried in this order
GIB = 1 << 30
# Host memory of a worker: torch alone has 0.5 GiB resident (measured), torch-xla, NxD and the runtime more. Both
# numbers are assumptions; a quarter of a pod's memory is left for page cache and /dev/shm.
LIBRARIES_GIB = 3
HOST_SHARE = 0.75

(SIZE,) = key_paths(TENSOR_PARALLEL)
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
    """A size with its batch and memory, with the first activation checkpointing that fits."""
    problems = list(group_problems(run.instance, size))
    if architecture:
        problems += length_problems(architecture, run.length, run.attention, size)
        problems += size_problems(architecture, size, instance.generation.target, instance.groups)
        problems += query_key_value_problems(architecture, run.targets, size)
    if nodes * instance.cores % size:
        return Candidate(size, tuple(problems))
    copies = nodes * instance.cores // size
    try:
        per_device, accumulation = batch(run, wishes, copies)
    except Refused as refused:
        return Candidate(size, (*problems, *refused.problems))
    first = wishes.checkpointing or CHECKPOINTING[0]
    layout = Layout(nodes, instance.cores, size, copies, per_device, accumulation, first)
    if architecture is None or problems:
        return Candidate(size, tuple(problems), layout)
    for checkpointing in [wishes.checkpointing] if wishes.checkpointing else CHECKPOINTING:
        layout = layout._replace(checkpointing=checkpointing)
        counted = memory(architecture, run.step(per_device, checkpointing), size, copies, instance.hbm)
        if counted.fits:
            return Candidate(size, (), layout, counted)
    too_large = Problem(
        (MEMORY,), needs(counted, f"activationCheckpointing {layout.checkpointing}"), "Use a larger instance."
    )
    return Candidate(size, (too_large,), layout, counted)


def batch(run: Run, wishes: Wishes, copies: int) -> tuple[int, int]:
    """(rows per copy and micro-batch, micro-batches per step). Raises Refused where the wishes conflict."""
    per_device, accumulation, wanted = wishes.per_device, wishes.accumulation, wishes.global_batch
    if wanted is None:
        at_once = per_device or 1
        if accumulation is None:
            accumulation = ACCUMULATION
            while run.rows and accumulation > 1 and at_once * accumulation * copies > run.rows[1]:
                accumulation -= 1
        return at_once, accumulation
    at_once = per_device or (max(1, wanted // (copies * accumulation)) if accumulation else 1)
    each = at_once * copies * (accumulation or 1)
    if wanted % each == 0 and (accumulation is None or wanted == each):
        return at_once, accumulation or wanted // each
    factors = [copies_of_model(copies), f"perDeviceBatchSize {per_device or 1}"]
    if accumulation:
        factors.append(f"gradientAccumulationSteps {accumulation}")
    unit = (per_device or 1) * copies * (accumulation or 1)
    around = sorted({wanted // unit * unit, -(-wanted // unit) * unit} - {0})
    fitting = [unit] if accumulation and per_device else around
    relation = "is not" if accumulation and per_device else "is not divisible by"
    raise Refused(Problem((BATCH,), f"{wanted} {relation} {' x '.join(factors)}", f"Use {either(fitting)}."))


def needs(counted: Memory, settings: str) -> str:
    return (
        f"needs {gib(counted.total)} GiB per core with {settings}, but a core has {gib(counted.hbm)} GiB (weights "
        f"{gib(counted.weights)}, activations {gib(counted.activations)}, logits {gib(counted.logits)}, backward pass "
        f"of a layer {gib(counted.working)}, reserved {gib(counted.reserved)})"
    )


def gib(number: float) -> str:
    """``1.9``; below 0.95 with two significant digits, ``0.084``."""
    value = number / GIB
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def copies_of_model(number: int) -> str:
    return "1 copy of the model" if number == 1 else f"{number} copies of the model"


def host_memory_note(architecture: Architecture, instance: Instance, size: int) -> Note | None:
    """A note where loading the model may exceed a pod's memory: each worker reads its part on the host."""
    needed = instance.cores * (BF16 * weights(architecture, size) / GIB + LIBRARIES_GIB)
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
    return Note(key, f"A step takes {layout.global_batch} rows and the dataset has {rows[1]}: {happens}. {fix}.")
