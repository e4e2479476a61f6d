"""What to tell where no layout works: the one change of the inputs, the smallest, that would make it work.

Each change is tried before it is told, by the same rules and the same memory as what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from genvalues.accelerators.instances import HYPERPOD, TRAINIUM, Instance, trainium
from genvalues.accelerators.memory import QUERY_KEY_VALUE
from genvalues.common.text import number_of
from genvalues.planner.candidates import CHECKPOINTING, Candidate, candidate, needs
from genvalues.planner.layout import Problem, Refused, Run, Wishes
from genvalues.planner.models import Model
from genvalues.settings.value_rules import FLASH_ROWS

CHANGEABLE = {"batch", "targets", "length"}  # kinds of rules that another batch, LoRA or length keeps


class Case(NamedTuple):
    """What was asked for, and the tensor-parallel sizes that were tried for it, in the order of preference.

    ``others`` are the wishes as they are while a change is tried: as written, or without those that may have to change
    after it. ``alone``: a change is for its own rule, and what else is wrong is told after it.
    """

    run: Run
    wishes: Wishes
    model: Model
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
        """Whether any of the sizes does, with this changed."""
        return any(self.works_with(each.size, run or self.run, wishes or self.others) for each in self.tried)

    def nearest(self, kind: str) -> Candidate | None:
        """The first size that breaks no other rule than of this kind.

        Alone, one that changes would satisfy, and of those the one whose change satisfies the others, too.
        """
        if not self.alone:
            return next((each for each in self.tried if each.kinds == {kind}), None)
        near = [each for each in self.tried if kind in each.kinds and each.kinds <= CHANGEABLE]
        most_copies_or_widest = min if kind == "batch" else max
        return most_copies_or_widest(near, key=lambda each: each.size, default=None)

    @property
    def too_much(self) -> str:
        """What the size that lacks least memory needs; nothing where none lacks memory alone."""
        told = [(each.memory, each.layout, each.size) for each in self.tried if each.kinds == {"memory"}]
        counted = [(memory.total, memory, layout, size) for memory, layout, size in told if memory and layout]
        if not counted:
            return ""
        _, memory, layout, size = min(counted, key=lambda each: each[0])
        text = f"{self.model.name} {needs(memory, layout)}, tensorParallelSize {size}"
        if layout.per_device == (self.wishes.per_device or 1):
            return text
        each = f" of each of {layout.data_parallel} copies of the model" if layout.data_parallel > 1 else ""
        return f"{layout.per_device} rows at once{each}: {text}"


def refused(
    run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, found: Candidate, tried: list[Candidate]
) -> Refused:
    """What to tell where nothing works: the wish that is in the way, else the mildest rule of all sizes."""
    where, what = ("parallelism", "tensorParallelSize"), "; ".join(text for _, text in found.problems)
    case = Case(run, wishes, model, instance, nodes, tried, wishes)
    if not wishes.tensor_parallel:
        return _mildest(case) or _cannot_be_cut(case)
    if working := " or ".join(str(each.size) for each in sorted(tried, key=lambda each: each.size) if each.works):
        return Refused(Problem(where, f"{found.size} {what}", f"Write {working}, or remove it."))
    # The size stays as it is written where changing something else makes it work. Else its rule is told, and what would
    # be told without the wish.
    alone = _mildest(case._replace(tried=[found]))
    if alone and alone.problems[0].key != ("instance",):
        return alone
    without = wishes._replace(tensor_parallel=None)
    case = case._replace(wishes=without, others=without)
    case = case._replace(tried=[each for each in tried if each.size in instance.generation.groups])
    beside = _mildest(case) or _cannot_be_cut(case)
    if alone and beside.problems[0].key == ("instance",):
        return beside
    return Refused(Problem(where, f"{found.size} {what}", "Remove it."), *beside.problems)


def _cannot_be_cut(case: Case) -> Refused:
    in_order = sorted(case.tried, key=lambda each: each.size)
    told = "; ".join(f"{each.size} {each.problems[0][1]}" for each in in_order)
    what = f"{case.model.name} cannot be cut for {case.run.instance}: tensorParallelSize {told}"
    return Refused(Problem(("model",), what, "Use another model or instance."))


def _mildest(case: Case) -> Refused | None:
    """The mildest change that makes one of these sizes work; None where no change does.

    Where no single one does, the first of several: after it there is a mistake at another key.
    """
    relaxed = case.wishes._replace(per_device=None, checkpointing=None, accumulation=None, global_batch=None)
    for others in (case.wishes, relaxed):
        for change in CHANGES:
            if problem := change(case._replace(others=others)):
                return Refused(problem)
    for change in (_global_batch, _targets, _divisible_length):
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
    less = " or less" if most > 1 and not case.others.global_batch else ""  # a batch is not shared out by any number
    return Problem(("training", "perDeviceBatchSize"), case.too_much, f"Write {most}{less}.")


def _checkpointing(case: Case) -> Problem | None:
    if not case.wishes.checkpointing or not case.too_much:
        return None
    fitting = [other for other in CHECKPOINTING if case.works(wishes=case.others._replace(checkpointing=other))]
    fix = f"Write {' or '.join(fitting)}, or remove it."
    return Problem(("training", "activationCheckpointing"), case.too_much, fix) if fitting else None


def _global_batch(case: Case) -> Problem | None:
    """One that can be shared out, and whose rows at once fit, where micro-batches are written but not their rows."""
    wishes, near = case.wishes, case.nearest("batch")
    derived = wishes.accumulation and not wishes.per_device and not case.alone
    if wishes.global_batch is None or not (near or (derived and case.too_much)):
        return None
    what = near.text("batch") if near else f"{number_of(wishes.global_batch, 'row')} a step are {case.too_much}"
    sizes = [near.size] if near and case.alone else [each.size for each in case.tried]
    fitting = next(filter(None, (_batches(case, size) for size in sizes)), [])
    fixes = [f"Write {' or '.join(map(str, fitting))}"] if fitting else []
    fewer_at_once = case.others._replace(global_batch=wishes.global_batch, accumulation=None)
    if derived and case.works(wishes=fewer_at_once):
        fixes.append("remove gradientAccumulationSteps" if fixes else "Remove gradientAccumulationSteps")
    return Problem(("training", "globalBatchSize"), what, f"{', or '.join(fixes)}.") if fixes else None


def _batches(case: Case, size: int) -> list[int]:
    """The global batches nearest to what is written that work with that size."""
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


def _most(works: Callable[[int], bool], limit: int) -> int:
    """The largest number of up to ``limit`` that works, where all below one that works do; 0 where none does."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if works(middle) else (least, middle - 1)
    return least


def _targets(case: Case) -> Problem | None:
    near, missing = case.nearest("targets"), [name for name in QUERY_KEY_VALUE if name not in case.run.targets]
    if near is None or not case.works(case.run._replace(targets=(*case.run.targets, *missing))):
        return None
    what = f"tensorParallelSize {near.size} {near.text('targets')}"
    return Problem(("lora", "targetModules"), what, f"Add {' and '.join(missing)}, or write all-linear.")


def _divisible_length(case: Case) -> Problem | None:
    near, length = case.nearest("length"), case.run.length
    if near is None:
        return None
    step = math.lcm(near.size, FLASH_ROWS if case.run.attention == "flash" else 1)
    around = [each for each in (length // step * step, -(-length // step) * step) if each]
    fitting = [str(each) for each in around if case.works(case.run._replace(length=each))]
    what = f"tensorParallelSize {near.size} {near.text('length')}"
    fix = f"Write {' or '.join(fitting)}."
    return Problem(("training", "maxSequenceLength"), what, fix) if fitting else None


def _shorter_rows(case: Case) -> Problem | None:
    if not case.too_much:
        return None
    largest = max(each.size for each in case.tried if each.kinds == {"memory"})
    unit = math.lcm(largest, FLASH_ROWS if case.run.attention == "flash" else 256)
    lengths = range((case.run.length - 1) // unit * unit, 0, -unit)
    shorter = next((length for length in lengths if case.works(case.run._replace(length=length))), None)
    fix = f"Write {shorter}, or use a larger instance."
    return Problem(("training", "maxSequenceLength"), case.too_much, fix) if shorter else None


def _another_instance(case: Case) -> Problem | None:
    if not case.too_much:
        return None
    fitting = list(_instances(case))
    fix = f"Use {' or '.join(dict.fromkeys((fitting[0], fitting[-1])))}, or a smaller model." if fitting else ""
    return Problem(("instance",), case.too_much, fix or "Use a smaller model.")


def _instances(case: Case) -> Iterator[str]:
    """The types of which one node does, of the same service."""
    prefix = HYPERPOD if case.run.instance.startswith(HYPERPOD) else ""
    wishes = case.others._replace(tensor_parallel=None)
    for name in TRAINIUM:
        instance = trainium(name)
        if instance is None or prefix + name == case.run.instance:
            continue
        run = case.run._replace(instance=prefix + name)
        sizes = (group for group in instance.generation.groups if group <= instance.cores)
        if any(candidate(run, wishes, case.model.architecture, instance, 1, size).works for size in sizes):
            yield prefix + name


# The mildest first.
CHANGES = (
    _micro_batch,
    _checkpointing,
    _global_batch,
    _targets,
    _divisible_length,
    _shorter_rows,
    _another_instance,
)
