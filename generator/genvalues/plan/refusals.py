"""What to tell where no layout works: the one change of the inputs, the smallest, that would make it work."""

from __future__ import annotations

import math

from genvalues.contradictions import FLASH_ROWS
from genvalues.instances import HYPERPOD, TRAINIUM, Instance, trainium
from genvalues.plan.candidates import CHECKPOINTING, Candidate, batch, candidate, needs
from genvalues.plan.layout import Problem, Refused, Run, Wishes
from genvalues.plan.memory import QUERY_KEY_VALUE, memory
from genvalues.plan.models import Model


def refused(
    run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, found: Candidate, tried: list[Candidate]
) -> Refused:
    """What to tell where nothing works: the wish that is in the way, else the mildest rule of all sizes."""
    where, what = ("parallelism", "tensorParallelSize"), "; ".join(text for _, text in found.problems)
    if not wishes.tensor_parallel:
        return _mildest(run, wishes, model, instance, nodes, tried) or _cannot_be_cut(run, model, tried)
    if working := " or ".join(str(each.size) for each in sorted(tried, key=lambda each: each.size) if each.works):
        return Refused(Problem(where, f"{found.size} {what}", f"Write {working}, or remove it."))
    # The size stays as it is written where changing something else makes it work. Else its rule is told, and what would
    # be told without the wish.
    alone = _mildest(run, wishes, model, instance, nodes, [found])
    if alone and alone.problems[0].key != ("instance",):
        return alone
    without = wishes._replace(tensor_parallel=None)
    others = [each for each in tried if each.size in instance.generation.groups]
    beside = _mildest(run, without, model, instance, nodes, others) or _cannot_be_cut(run, model, others)
    if alone and beside.problems[0].key == ("instance",):
        return beside
    return Refused(Problem(where, f"{found.size} {what}", "Remove it."), *beside.problems)


def _cannot_be_cut(run: Run, model: Model, tried: list[Candidate]) -> Refused:
    told = "; ".join(f"{each.size} {each.problems[0][1]}" for each in sorted(tried, key=lambda each: each.size))
    what = f"{model.name} cannot be cut for {run.instance}: tensorParallelSize {told}"
    return Refused(Problem(("model",), what, "Use another model or instance."))


def _mildest(
    run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, tried: list[Candidate]
) -> Refused | None:
    """The rule of these sizes that the smallest change satisfies; None where no single change does."""
    by_memory = [each.size for each in tried if each.kinds == {"memory"}]
    without = wishes._replace(per_device=None, checkpointing=None)
    if without != wishes and any(_fits(run, without, model, instance, nodes, size) for size in by_memory):
        return _memory_refused(run, wishes, model, instance, nodes, tried)
    # The rules that one change of the inputs would satisfy, the mildest first.
    for kind, key in (
        ("batch", ("training", "globalBatchSize")),
        ("targets", ("lora", "targetModules")),
        ("length", ("training", "maxSequenceLength")),
    ):
        near = next((each for each in tried if each.kinds == {kind}), None)
        if near is None or not _fits(run, wishes, model, instance, nodes, near.size):
            continue
        if kind == "batch":
            return _batch_refused(run, wishes, instance, nodes, tried)
        if kind == "targets":
            missing = [name for name in QUERY_KEY_VALUE if name not in run.targets]
            return Refused(
                Problem(
                    key,
                    f"tensorParallelSize {near.size} {near.problems[0][1]}",
                    f"Add {' and '.join(missing)}, or write all-linear.",
                )
            )
        step = math.lcm(near.size, FLASH_ROWS if run.attention == "flash" else 1)
        around = (run.length // step * step, -(-run.length // step) * step)
        fitting = " or ".join(str(length) for length in around if length)
        return Refused(Problem(key, f"tensorParallelSize {near.size} {near.problems[0][1]}", f"Write {fitting}."))
    return _memory_refused(run, wishes, model, instance, nodes, tried) if by_memory else None


def _fits(run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, size: int) -> bool:
    """Whether memory would do with that size, whatever else is wrong with it."""
    if model.architecture is None:
        return True
    copies = max(1, nodes * instance.cores // size)
    return any(
        memory(model.architecture, run.step(wishes.per_device or 1, checkpointing), size, copies, instance.hbm).fits
        for checkpointing in ([wishes.checkpointing] if wishes.checkpointing else CHECKPOINTING)
    )


def _batch_refused(run: Run, wishes: Wishes, instance: Instance, nodes: int, tried: list[Candidate]) -> Refused:
    near = next(each for each in tried if each.kinds == {"batch"})
    try:
        batch(run, wishes, nodes * instance.cores // near.size)
    except Refused as refused:
        return refused
    raise AssertionError("a batch that was refused is not any more")


def _memory_refused(
    run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, tried: list[Candidate]
) -> Refused:
    architecture = model.architecture
    assert architecture is not None
    by_memory = [each for each in tried if each.kinds == {"memory"} and each.memory and each.layout]
    best = min(by_memory, key=lambda each: each.memory.total if each.memory else 0)
    assert best.layout is not None and best.memory is not None
    told = f"{model.name} {needs(best.memory, best.layout)}, tensorParallelSize {best.size}"
    sizes = [each.size for each in by_memory]  # those that keep the rules

    def fits(length: int, per_device: int, options: tuple[str, ...]) -> bool:
        shorter = run._replace(length=length)
        return any(
            memory(
                architecture, shorter.step(per_device, each), size, nodes * instance.cores // size, instance.hbm
            ).fits
            for size in sizes
            for each in options
        )

    options = (wishes.checkpointing,) if wishes.checkpointing else CHECKPOINTING
    at_once = wishes.per_device or 1
    if at_once > 1 and fits(run.length, 1, options):
        most = next(rows for rows in range(at_once - 1, 0, -1) if fits(run.length, rows, options))
        return Refused(Problem(("training", "perDeviceBatchSize"), told, f"Write {most} or less."))
    if wishes.checkpointing and (
        fitting := [each for each in ("selective", "full") if fits(run.length, at_once, (each,))]
    ):
        return Refused(
            Problem(("training", "activationCheckpointing"), told, f"Write {' or '.join(fitting)}, or remove it.")
        )
    unit = math.lcm(max(sizes), FLASH_ROWS if run.attention == "flash" else 256)
    lengths = range((run.length - 1) // unit * unit, 0, -unit)
    shorter = next((length for length in lengths if fits(length, at_once, options)), None)
    if shorter is None and at_once > 1 and wishes.checkpointing:  # one wish after the other
        if any(fits(length, 1, CHECKPOINTING) for length in lengths):
            return Refused(Problem(("training", "perDeviceBatchSize"), told, "Write 1, or remove it."))
    elif shorter is None:
        shorter = next((length for length in lengths if fits(length, 1, CHECKPOINTING)), None)
    if shorter:
        return Refused(Problem(("training", "maxSequenceLength"), told, f"Write {shorter}, or use a larger instance."))
    prefix = HYPERPOD if run.instance.startswith(HYPERPOD) else ""
    larger = [prefix + name for name in TRAINIUM if _works_on(run, wishes, model, prefix + name)]
    fix = f"Use {' or '.join(dict.fromkeys((larger[0], larger[-1])))}, or a smaller model." if larger else ""
    return Refused(Problem(("instance",), told, fix or "Use a smaller model."))


def _works_on(run: Run, wishes: Wishes, model: Model, name: str) -> bool:
    instance = trainium(name)
    if instance is None or name == run.instance:
        return False
    other = Wishes(per_device=wishes.per_device, checkpointing=wishes.checkpointing)
    for size in (group for group in instance.generation.groups if group <= instance.cores):
        if candidate(run._replace(instance=name), other, model.architecture, instance, 1, size).works:
            return True
    return False
