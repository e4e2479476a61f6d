"""In words: why each choice is made, and why each alternative is not."""

from __future__ import annotations

from collections.abc import Iterator

from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import Memory, memory
from genvalues.planner.candidates import ACCUMULATION, Candidate, gib
from genvalues.planner.estimate import flops_per_token
from genvalues.planner.layout import Choice, Layout, Rejection, Run, Wishes
from genvalues.planner.models import Model


def size_reason(found: Candidate, usual: int, wishes: Wishes, instance: Instance, name: str) -> str:
    fit = f"; {gib(found.memory.total)} of {gib(found.memory.hbm)} GiB a core" if found.memory else ""
    if wishes.tensor_parallel:
        return f"as written{fit}"
    if found.size == usual:
        whose = "what optimum-neuron's own example has for Llama 3.1 8B on" if usual > 2 else "all cores of"
        return f"{whose} {instance.generation.target if usual > 2 else name}{fit}"
    return f"{usual}, the usual one, does not work (below){fit}"


def micro_batch_reason(run: Run, model: Model, instance: Instance, found: Candidate) -> str:
    if model.architecture is None or found.layout is None:
        return "one row at once: the smallest graphs"
    layout = found.layout
    twice = memory(
        model.architecture,
        run.step(2 * layout.per_device, layout.checkpointing),
        layout.tensor_parallel,
        layout.data_parallel,
        instance.hbm,
    )
    return f"one row at once: the smallest graphs, which compile fastest; 2 would need {gib(twice.total)} GiB"


def batch_choices(run: Run, wishes: Wishes, layout: Layout, micro_batch: str) -> list[Choice]:
    if wishes.per_device:
        micro_batch = "as written"
    copies = f"{layout.per_device} x {layout.accumulation} x {copies_of(layout.data_parallel)}"
    if wishes.accumulation:
        accumulated = "as written"
    elif wishes.global_batch:
        accumulated = (
            f"globalBatchSize {wishes.global_batch} / ({copies_of(layout.data_parallel)} x {layout.per_device})"
        )
    elif layout.accumulation < ACCUMULATION and run.rows:
        accumulated = f"{ACCUMULATION} would take more rows a step than the dataset's {run.rows[1]}"
    else:
        accumulated = f"{ACCUMULATION}, as in the example this project began with (12 rows a step on a trn1.32xlarge)"
    return [
        Choice(
            "training.perDeviceBatchSize",
            layout.per_device,
            micro_batch or "one row at once",
            wished=bool(wishes.per_device),
        ),
        Choice(
            "training.gradientAccumulationSteps", layout.accumulation, accumulated, wished=bool(wishes.accumulation)
        ),
        Choice(
            "training.globalBatchSize",
            layout.global_batch,
            "as written" if wishes.global_batch else f"rows of an optimizer step: {copies}",
            wished=bool(wishes.global_batch),
        ),
    ]


def copies_of(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def checkpointing_reason(run: Run, wishes: Wishes, model: Model, instance: Instance, found: Candidate) -> str:
    if wishes.checkpointing:
        return "as written"
    if model.architecture is None or found.layout is None or found.memory is None:
        return "the default; memory is not counted, for want of the model's sizes"
    layout = found.layout
    if layout.checkpointing == "full":
        return "whole layers are computed again: selective would not fit (below)"
    if run.attention == "flash":
        return "flash attention keeps no scores: selective and none are the same with it"
    none = memory(
        model.architecture,
        run.step(layout.per_device, "none"),
        layout.tensor_parallel,
        layout.data_parallel,
        instance.hbm,
    )
    saved = none.activations + none.working - found.memory.activations - found.memory.working
    return f"attention's scores are computed again: {gib(saved)} GiB a core less than none"


def rejected_sizes(found: Candidate, tried: dict[int, Candidate], instance: Instance) -> Iterator[Rejection]:
    for size in sorted({1 << power for power in range(instance.cores.bit_length())} | set(tried)):
        if size == found.size or size > instance.cores:
            continue
        key, other = "parallelism.tensorParallelSize", tried.get(size)
        if other is None:
            groups = ", ".join(str(group) for group in instance.generation.groups if group <= instance.cores)
            yield Rejection(key, size, f"is no group of processes on {instance.generation.target} ({groups} are)")
        elif other.problems:
            yield Rejection(key, size, "; ".join(text for _, text in other.problems))
        else:
            fit = f"works ({gib(other.memory.total)} GiB a core), but " if other.memory else "may work, but "
            why = (
                "more workers exchange every layer's activations, and there are fewer copies to take rows"
                if size > found.size
                else "each core holds more of the model"
            )
            yield Rejection(key, size, f"{fit}{why}", possible=True)


def rejected_settings(
    run: Run, wishes: Wishes, model: Model, instance: Instance, found: Candidate
) -> Iterator[Rejection]:
    """The other recomputations, and twice the micro-batch, by memory and by operations."""
    if model.architecture is None or found.layout is None:
        return
    layout, architecture = found.layout, model.architecture

    def counted(per_device: int, checkpointing: str) -> Memory:
        step = run.step(per_device, checkpointing)
        return memory(architecture, step, layout.tensor_parallel, layout.data_parallel, instance.hbm)

    chosen = flops_per_token(architecture, run.step(layout.per_device, layout.checkpointing)).total
    for other in ("none", "selective", "full"):
        if other == layout.checkpointing or (
            run.attention == "flash" and {other, layout.checkpointing} <= {"none", "selective"}
        ):
            continue
        needed = counted(layout.per_device, other)
        change = flops_per_token(architecture, run.step(layout.per_device, other)).total / chosen - 1
        if needed.fits:
            rule = f"works ({gib(needed.total)} GiB a core, {change:+.0%} operations)"
            rule += ", but leaves less for what cannot be counted" if change < 0 else ", but computes more than it must"
        else:
            rule = f"does not fit: {gib(needed.total)} of {gib(needed.hbm)} GiB a core"
        if wishes.checkpointing:
            rule += "; another is written"
        yield Rejection("training.activationCheckpointing", other, rule, possible=needed.fits)
    twice = counted(2 * layout.per_device, layout.checkpointing)
    if not twice.fits:
        yield Rejection(
            "training.perDeviceBatchSize",
            2 * layout.per_device,
            f"does not fit: {gib(twice.total)} of {gib(twice.hbm)} GiB a core",
        )
