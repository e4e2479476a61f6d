"""The wording of a plan: why each choice is made, and why each alternative is not."""

from __future__ import annotations

from collections.abc import Iterator

from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import Memory, memory
from genvalues.accelerators.neuron_rules import TENSOR_PARALLEL, group_problems
from genvalues.planner.candidates import ACCUMULATION, Candidate, gib
from genvalues.planner.estimate import flops_per_token
from genvalues.planner.layout import FROM_INPUTS, Choice, Layout, Rejection, Run, Wishes, choice
from genvalues.planner.models import ModelFacts

CHECKPOINTING, PER_DEVICE = "training.activationCheckpointing", "training.perDeviceBatchSize"


def layout_choices(
    run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, found: Candidate, layout: Layout, usual: int
) -> list[Choice]:
    """The choices of a layout on Trainium, without the number of nodes. ``usual`` is the default size."""
    node_count = f"{layout.nodes} node{'' if layout.nodes == 1 else 's'}"
    return [
        Choice(
            TENSOR_PARALLEL,
            found.size,
            size_reason(run, wishes, instance, found, usual),
            wished=wishes.tensor_parallel is not None,
        ),
        Choice(
            "parallelism.dataParallelSize",
            layout.data_parallel,
            f"copies of the model: {node_count} x {instance.cores} cores / {found.size}",
        ),
        *batch_choices(run, wishes, layout, micro_batch_reason(run, model, instance, layout)),
        choice(
            CHECKPOINTING,
            layout.checkpointing,
            wishes.checkpointing,
            checkpointing_reason(run, model, instance, found, layout),
        ),
        Choice(
            "sequence parallelism",
            "on" if found.size > 1 else "off",
            "always on with tensor parallelism: splits activations by tokens",
        ),
        Choice(
            "ZeRO-1",
            "on",
            f"always on: shards AdamW's fp32 weights and moments over {copies_of(layout.data_parallel)}",
        ),
    ]


def size_reason(run: Run, wishes: Wishes, instance: Instance, found: Candidate, usual: int) -> str:
    fit = f"; uses {gib(found.memory.total)} of {gib(found.memory.hbm)} GiB per core" if found.memory else ""
    if wishes.tensor_parallel:
        return f"{FROM_INPUTS}{fit}"
    if found.size != usual:
        return f"the default, {usual}, does not work (see below){fit}"
    if usual > 2:
        return f"default on {instance.generation.target}, as in optimum-neuron's Llama 3.1 8B example{fit}"
    return f"all cores of {run.instance}{fit}"


def micro_batch_reason(run: Run, model: ModelFacts, instance: Instance, layout: Layout) -> str:
    if model.architecture is None:
        return "default: the smallest graphs"
    twice = layout_memory(run, model, instance, layout, layout.checkpointing, 2 * layout.per_device)
    return f"default: the smallest graphs compile fastest; 2 would use {gib(twice.total)} GiB per core" if twice else ""


def batch_choices(run: Run, wishes: Wishes, layout: Layout, micro_batch: str) -> list[Choice]:
    copies = copies_of(layout.data_parallel)
    if wishes.global_batch:
        accumulated = f"globalBatchSize {wishes.global_batch} / ({copies} x {layout.per_device})"
    elif layout.accumulation < ACCUMULATION and run.rows:
        accumulated = f"the default, {ACCUMULATION}, takes more rows per step than the dataset's {run.rows[1]}"
    else:
        accumulated = "default"
    rows = f"rows per optimizer step: {layout.per_device} x {layout.accumulation} x {copies}"
    return [
        choice(PER_DEVICE, layout.per_device, wishes.per_device, micro_batch),
        choice("training.gradientAccumulationSteps", layout.accumulation, wishes.accumulation, accumulated),
        choice("training.globalBatchSize", layout.global_batch, wishes.global_batch, rows),
    ]


def copies_of(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def checkpointing_reason(run: Run, model: ModelFacts, instance: Instance, found: Candidate, layout: Layout) -> str:
    none = layout_memory(run, model, instance, layout, "none", layout.per_device)
    if found.memory is None or none is None:
        return "default; memory is not checked, because the model's architecture is unknown"
    if layout.checkpointing == "full":
        return "recomputes whole layers; selective does not fit (see below)"
    if run.attention == "causal":
        return "default; same as none, because causal attention keeps no scores"
    saved = none.activations + none.working - found.memory.activations - found.memory.working
    return f"recomputes attention scores, which saves {gib(saved)} GiB per core"


def layout_memory(
    run: Run, model: ModelFacts, instance: Instance, layout: Layout, checkpointing: str, per_device: int
) -> Memory | None:
    """The memory of a layout with another checkpointing or micro-batch; None for an unknown model."""
    if model.architecture is None:
        return None
    step = run.step(per_device, checkpointing)
    return memory(model.architecture, step, layout.tensor_parallel, layout.data_parallel, instance.hbm)


def rejected_sizes(run: Run, instance: Instance, found: Candidate, tried: dict[int, Candidate]) -> Iterator[Rejection]:
    for size in sorted({1 << power for power in range(instance.cores.bit_length())} | set(tried)):
        if size == found.size or size > instance.cores:
            continue
        other = tried.get(size, Candidate(size, tuple(group_problems(run.instance, size))))
        if other.problems:
            yield Rejection(TENSOR_PARALLEL, size, other.reasons)
            continue
        fit = f"works ({gib(other.memory.total)} GiB per core)" if other.memory else "may work"
        costs = (
            "more workers exchange activations in every layer, and there are fewer copies of the model"
            if size > found.size
            else "each core holds more of the model"
        )
        yield Rejection(TENSOR_PARALLEL, size, f"{fit}, but {costs}", possible=True)


def rejected_settings(
    run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, layout: Layout
) -> Iterator[Rejection]:
    """The other activation checkpointings and twice the micro-batch, by memory and FLOPs."""
    if model.architecture is None:
        return
    chosen = flops_per_token(model.architecture, run.step(layout.per_device, layout.checkpointing)).total
    for other in ("none", "selective", "full"):
        same = run.attention == "causal" and {other, layout.checkpointing} <= {"none", "selective"}
        needed = layout_memory(run, model, instance, layout, other, layout.per_device)
        if same or other == layout.checkpointing or needed is None:
            continue
        change = flops_per_token(model.architecture, run.step(layout.per_device, other)).total / chosen - 1
        reason = f"does not fit: {gib(needed.total)} of {gib(needed.hbm)} GiB per core"
        if needed.fits:
            but = (
                "leaves less room for memory that cannot be estimated" if change < 0 else "recomputes more than needed"
            )
            reason = f"works ({gib(needed.total)} GiB per core, {change:+.0%} FLOPs), but {but}"
        if wishes.checkpointing:
            reason += f"; {layout.checkpointing} is {FROM_INPUTS}"
        yield Rejection(CHECKPOINTING, other, reason, possible=needed.fits)
    twice = layout_memory(run, model, instance, layout, layout.checkpointing, 2 * layout.per_device)
    if twice and not twice.fits:
        reason = f"does not fit: {gib(twice.total)} of {gib(twice.hbm)} GiB per core"
        yield Rejection(PER_DEVICE, 2 * layout.per_device, reason)
