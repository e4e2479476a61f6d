"""The error where no layout works: the smallest change of the inputs that makes one work.

Each change is tried before it is suggested, with the rules and the memory that apply to what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from genvalues.accelerators.instances import Instance, default_backend, of_same_service
from genvalues.accelerators.memory import keeps_scores
from genvalues.accelerators.native_rules import ROWS
from genvalues.accelerators.neuron_rules import FLASH_ROWS, QUERY_KEY_VALUE, either
from genvalues.common.problems import Problem
from genvalues.common.text import KeyPath
from genvalues.planner.candidates import (
    BATCH,
    CHECKPOINTING,
    MEMORY,
    SHARD,
    SIZE,
    Candidate,
    candidate,
    needs,
    settings,
)
from genvalues.planner.layout import Refused, Run, Wishes
from genvalues.planner.models import ModelFacts

TARGETS: KeyPath = ("lora", "targetModules")
LENGTH: KeyPath = ("training", "maxSequenceLength")


# The inputs that planning chooses if they are left out, by their field in Wishes.
PLANNED = {
    "backend": "backend",
    "tensor_parallel": "parallelism.tensorParallelSize",
    "shard_size": "parallelism.shardSize",
    "per_device": "training.perDeviceBatchSize",
    "accumulation": "training.gradientAccumulationSteps",
    "global_batch": "training.globalBatchSize",
    "checkpointing": "training.activationCheckpointing",
}


class Case(NamedTuple):
    """The request, and the tensor-parallel sizes that were tried for it, in the order of preference.

    ``others`` are the wishes while a change is tried: those of the inputs, or without those that may have to change
    next. ``alone``: a change need only satisfy its own rule; other problems are reported afterwards.
    """

    run: Run
    wishes: Wishes
    model: ModelFacts
    instance: Instance
    nodes: int
    tried: Sequence[Candidate]
    others: Wishes
    alone: bool = False

    def works_with(self, size: int, run: Run, wishes: Wishes) -> bool:
        if self.alone:
            return True
        return candidate(run, wishes, self.model.architecture, self.instance, self.nodes, size).works

    def works(self, run: Run | None = None, wishes: Wishes | None = None) -> bool:
        """Whether any of the sizes works with this change."""
        return any(self.works_with(each.size, run or self.run, wishes or self.others) for each in self.tried)

    def nearest(self, key: KeyPath) -> Candidate | None:
        """The first size that is blocked only by this setting.

        With ``alone`` it may need changes of shard size, batch, LoRA targets and row length together. Then it is the
        size whose change helps the others too: the one with the most copies for shard size and batch, else the largest.
        """
        if not self.alone:
            return next((each for each in self.tried if each.blocked_by == {key}), None)
        near = [
            each for each in self.tried if key in each.blocked_by and each.blocked_by <= {SHARD, BATCH, TARGETS, LENGTH}
        ]
        most_copies_or_widest = min if key in (BATCH, SHARD) else max
        return most_copies_or_widest(near, key=lambda each: each.size, default=None)

    @property
    def too_much(self) -> str:
        """The memory of the size that lacks least; empty where no size lacks only memory."""
        short = [(each.memory, each.layout, each.size) for each in self.tried if each.blocked_by == {MEMORY}]
        counted = [(memory.total, memory, layout, size) for memory, layout, size in short if memory and layout]
        if not counted:
            return ""
        _, memory, layout, size = min(counted, key=lambda each: each[0])
        rows = f"perDeviceBatchSize {layout.per_device}, " if layout.per_device > 1 else ""
        sizes = f"{rows}tensorParallelSize {size}{', ' if self.run.backend == 'native' else ' and '}"
        return f"{self.model.name} {needs(memory, sizes + settings(self.run, layout))}"

    def row_unit(self, size: int, otherwise: int) -> int:
        """What row lengths are a multiple of with groups of ``size``; ``otherwise`` for isolated attention."""
        if self.run.backend == "native":
            return ROWS
        return math.lcm(size, otherwise if keeps_scores(self.run.attention) else FLASH_ROWS)


def refused(
    run: Run,
    wishes: Wishes,
    model: ModelFacts,
    instance: Instance,
    nodes: int,
    found: Candidate,
    tried: list[Candidate],
) -> Refused:
    """The error where nothing works: the wish that prevents it, else the smallest change of all sizes."""
    case = Case(run, wishes, model, instance, nodes, tried, wishes)
    if not wishes.tensor_parallel:
        return _smallest_change(case) or _cannot_be_split(case)
    if working := sorted(each.size for each in tried if each.works):
        return Refused(Problem((SIZE,), found.reasons, f"Use {either(working)}, or remove it."))
    # The size stays where another change makes it work. Else its own rule is reported, with the error without the wish.
    alone = _smallest_change(case._replace(tried=[found]))
    if alone and alone.problems[0].keys[0] != MEMORY:
        return alone
    without = wishes._replace(tensor_parallel=None)
    possible = [each for each in tried if each.size in instance.groups]
    case = case._replace(wishes=without, others=without, tried=possible)
    beside = _smallest_change(case) or _cannot_be_split(case)
    if alone and beside.problems[0].keys[0] == MEMORY:
        return beside
    return Refused(Problem((SIZE,), found.reasons, "Remove it."), *beside.problems)


def _cannot_be_split(case: Case) -> Refused:
    in_order = sorted(case.tried, key=lambda each: each.size)
    why = "; ".join(f"tensorParallelSize {each.size}: {each.problems[0].what}" for each in in_order)
    what = f"{case.model.name} cannot be split over {case.run.instance}: {why}"
    return Refused(Problem((("model",),), what, "Use another model or instance."))


def _smallest_change(case: Case) -> Refused | None:
    """The smallest change that makes one of these sizes work; None where no change does.

    Where a single change is not enough, the first of several: after it another key has the error.
    """
    relaxed = case.wishes._replace(
        per_device=None, checkpointing=None, shard_size=None, accumulation=None, global_batch=None
    )
    for others in (case.wishes, relaxed):
        for change in CHANGES:
            if problem := change(case._replace(others=others)):
                return Refused(problem)
    for change in (_shard_size, _global_batch, _targets, _divisible_length):
        if problem := change(case._replace(alone=True)):
            return Refused(problem)
    return None


def _micro_batch(case: Case) -> Problem | None:
    rows = case.wishes.per_device or 1
    if rows == 1 or not case.too_much:
        return None
    fewer = range(rows - 1, 0, -1)
    most = next((number for number in fewer if case.works(wishes=case.others._replace(per_device=number))), None)
    if most is None:
        return None
    less = " or less" if most > 1 and not case.others.global_batch else ""  # a global batch is not always divisible
    return Problem((("training", "perDeviceBatchSize"),), case.too_much, f"Use {most}{less}.")


def _checkpointing(case: Case) -> Problem | None:
    if not case.wishes.checkpointing or not case.too_much:
        return None
    fitting = [other for other in CHECKPOINTING if case.works(wishes=case.others._replace(checkpointing=other))]
    fix = f"Use {either(fitting)}, or remove it."
    return Problem((("training", "activationCheckpointing"),), case.too_much, fix) if fitting else None


def _shard_size(case: Case) -> Problem | None:
    """Backend native: another number of copies that share the base weights."""
    near = case.nearest(SHARD)
    if not case.wishes.shard_size or not (near or case.too_much):
        return None
    possible = case.instance.groups
    if near:
        copies = case.nodes * case.instance.cores // near.size
        possible = [size for size in possible if copies % size == 0]
    fitting = [size for size in possible if case.works(wishes=case.others._replace(shard_size=size))]
    what = near.reason(SHARD) if near else case.too_much
    return Problem((SHARD,), what, f"Use {either(fitting)}, or remove it.") if fitting else None


def _global_batch(case: Case) -> Problem | None:
    """A divisible global batch, whose micro-batches fit where the inputs set their number but not their rows."""
    wishes, near = case.wishes, case.nearest(BATCH)
    derived = wishes.accumulation and not wishes.per_device and not case.alone
    if wishes.global_batch is None or not (near or (derived and case.too_much)):
        return None
    what = near.reason(BATCH) if near else f"with {wishes.global_batch} rows per step {case.too_much}"
    sizes = [near.size] if near and case.alone else [each.size for each in case.tried]
    possible = [found for size in sizes if (found := _batches(case, size))]
    fitting = possible[0] if possible else []
    if case.run.backend == "native":  # any size will do: the nearest of all
        fitting = _nearest(wishes.global_batch, [batch for found in possible for batch in found])
    fixes = [f"Use {either(fitting)}"] if fitting else []
    types = of_same_service(case.run.instance)
    fewer_cores = [name for name in _instances(case, wishes) if types[name].cores < case.instance.cores]
    if case.run.backend == "native" and near and fewer_cores:
        fixes.append(f"set instance to {fewer_cores[0]}, which has {types[fewer_cores[0]].cores} cores")
    fewer_at_once = case.others._replace(global_batch=wishes.global_batch, accumulation=None)
    if derived and case.works(wishes=fewer_at_once):
        fixes.append("remove gradientAccumulationSteps" if fixes else "Remove gradientAccumulationSteps")
    return Problem((BATCH,), what, f"{', or '.join(fixes)}.") if fixes else None


def _batches(case: Case, size: int) -> list[int]:
    """The nearest global batches that work with a size."""
    wishes, wanted = case.wishes, case.wishes.global_batch or 1
    copies, rest = divmod(case.nodes * case.instance.cores, size)
    if rest:
        return []
    unit = copies * (wishes.per_device or 1) * (wishes.accumulation or 1)
    kept = case.others._replace(per_device=wishes.per_device, accumulation=wishes.accumulation)

    def works(batch: int) -> bool:
        return case.works_with(size, case.run, kept._replace(global_batch=batch))

    if wishes.per_device and wishes.accumulation:
        return [unit] if unit != wanted and works(unit) else []
    around = {wanted // unit * unit, -(-wanted // unit) * unit} - {0, wanted}
    if fitting := sorted(batch for batch in around if works(batch)):
        return fitting
    most = _most(lambda rows: works(unit * rows), wanted // unit)
    return [unit * most] if most else []


def _nearest(wanted: int, batches: Sequence[int]) -> list[int]:
    """The nearest below and above."""
    below, above = [each for each in batches if each < wanted], [each for each in batches if each > wanted]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _most(works: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that works, if all smaller ones do (bisection); 0 where none does."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if works(middle) else (least, middle - 1)
    return least


def _targets(case: Case) -> Problem | None:
    near, missing = case.nearest(TARGETS), [name for name in QUERY_KEY_VALUE if name not in case.run.targets]
    if near is None or not case.works(case.run._replace(targets=(*case.run.targets, *missing))):
        return None
    return Problem((TARGETS,), near.reason(TARGETS), f"Add {' and '.join(missing)}, or use all-linear.")


def _divisible_length(case: Case) -> Problem | None:
    near, length = case.nearest(LENGTH), case.run.length
    if near is None:
        return None
    step = case.row_unit(near.size, 1)
    around = [each for each in (length // step * step, -(-length // step) * step) if each]
    fitting = [each for each in around if case.works(case.run._replace(length=each))]
    return Problem((LENGTH,), near.reason(LENGTH), f"Use {either(fitting)}.") if fitting else None


def _shorter_rows(case: Case) -> Problem | None:
    if not case.too_much:
        return None
    largest = max(each.size for each in case.tried if each.blocked_by == {MEMORY})
    unit = case.row_unit(largest, 256)
    lengths = range((case.run.length - 1) // unit * unit, 0, -unit)
    shorter = next((length for length in lengths if case.works(case.run._replace(length=length))), None)
    fix = f"Use {shorter}, or a larger instance."
    return Problem((LENGTH,), case.too_much, fix) if shorter else None


def _another_backend(case: Case) -> Problem | None:
    """Backend native where the inputs ask for xla: it can divide the base weights among copies of the model."""
    if not case.too_much or case.run.backend != "xla" or case.instance.generation.backend == "xla":
        return None
    run, wishes = case.run._replace(backend="native"), case.others._replace(backend=None, tensor_parallel=None)
    architecture, sizes = case.model.architecture, case.instance.groups
    if not any(candidate(run, wishes, architecture, case.instance, case.nodes, size).works for size in sizes):
        return None
    return Problem(
        (("backend",),), case.too_much, "Use backend native, which can share the base weights, or remove it."
    )


def _another_instance(case: Case) -> Problem | None:
    if not case.too_much:
        return None
    removed = ""
    if not (fitting := list(_instances(case, case.others))):
        wished = [key for field, key in PLANNED.items() if getattr(case.wishes, field) is not None]
        removed = f"emove {', '.join(wished)}" if wished else ""
        planned = Wishes(backend=case.wishes.backend)
        if wished and case.works(wishes=planned):
            return Problem((MEMORY,), case.too_much, f"R{removed}, which are planned then, or use a smaller model.")
        fitting = list(_instances(case, Wishes(), backend=None))
    smallest_and_largest = list(dict.fromkeys((fitting[0], fitting[-1]))) if fitting else []
    use = f"Use {either(smallest_and_largest)}{f' and r{removed}' if removed else ''}"
    return Problem((MEMORY,), case.too_much, f"{use}, or a smaller model." if fitting else "Use a smaller model.")


def _instances(case: Case, others: Wishes, backend: str | None = "") -> Iterator[str]:
    """The instance types of the same service of which one node is enough for these wishes.

    ``backend``: "" for that of the inputs, None for that of each type.
    """
    wishes = others._replace(tensor_parallel=None)
    for name, instance in of_same_service(case.run.instance).items():
        if name == case.run.instance:
            continue
        if case.run.backend == "native" and default_backend(name) == "xla":
            continue  # no way on for a run that starts now
        wanted = case.wishes.backend if backend == "" else backend
        run = case.run._replace(instance=name, backend=wanted or default_backend(name))
        if any(candidate(run, wishes, case.model.architecture, instance, 1, size).works for size in instance.groups):
            yield name


CHANGES = (  # the smallest first
    _micro_batch,
    _checkpointing,
    _shard_size,
    _global_batch,
    _targets,
    _divisible_length,
    _shorter_rows,
    _another_backend,
    _another_instance,
)
