"""The wording of a plan: why each choice is made, and why each alternative is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance, trainium
from genvalues.accelerators.memory import keeps_scores
from genvalues.accelerators.native_memory import NativeMemory
from genvalues.accelerators.neuron_rules import ATTENTION, SHARD_SIZE, TENSOR_PARALLEL, group_problems
from genvalues.common.text import number_of
from genvalues.planner.candidates import (
    ACCUMULATION,
    STEP_ROWS,
    Candidate,
    copies_of,
    gib,
    layout_memory,
    length_problems,
    shard_sizes,
)
from genvalues.planner.estimate import flops_per_token
from genvalues.planner.layout import FROM_INPUTS, Choice, Layout, Memory, Rejection, Run, Wishes, choice
from genvalues.planner.models import ModelFacts

CHECKPOINTING, PER_DEVICE = "training.activationCheckpointing", "training.perDeviceBatchSize"


def layout_choices(
    run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, found: Candidate, layout: Layout, usual: Candidate
) -> list[Choice]:
    """The choices of a layout on Trainium, without the number of nodes. ``usual`` has the default size."""
    node_count = number_of(layout.nodes, "node")
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
        *(
            [choice(SHARD_SIZE, layout.shard_size, wishes.shard_size, shard_reason(run, model, instance, layout))]
            if run.backend == "native"
            else []
        ),
        *batch_choices(run, wishes, layout, micro_batch_reason(run, model, instance, layout)),
        choice(
            CHECKPOINTING,
            layout.checkpointing,
            wishes.checkpointing,
            checkpointing_reason(run, model, instance, found, layout),
        ),
        *(xla_choices(found.size, layout) if run.backend == "xla" else ()),
    ]


def xla_choices(size: int, layout: Layout) -> Iterator[Choice]:
    """What optimum-neuron always does."""
    yield Choice(
        "sequence parallelism",
        "on" if size > 1 else "off",
        "always on with tensor parallelism: splits activations by tokens",
    )
    yield Choice(
        "ZeRO-1",
        "on",
        f"always on: shards AdamW's fp32 weights and moments over {copies_of(layout.data_parallel)}",
    )


def size_reason(run: Run, wishes: Wishes, instance: Instance, found: Candidate, usual: Candidate) -> str:
    fit = f"; uses {gib(found.memory.total)} of {gib(found.memory.hbm)} GiB per core" if found.memory else ""
    if wishes.tensor_parallel:
        return f"{FROM_INPUTS}{fit}"
    if run.backend == "native":
        if found.size == usual.size:
            return f"no tensor parallelism: it exchanges activations in every layer, and is not needed{fit}"
        return f"{usual.size} does not work: {usual.problems[0].what}{fit}"
    return xla_size_reason(run, instance, found.size, usual.size, fit)


def xla_size_reason(run: Run, instance: Instance, size: int, usual: int, fit: str) -> str:
    if size != usual:
        return f"the default, {usual}, does not work (see below){fit}"
    if usual > 2:
        return f"default on {instance.generation.target}, as in optimum-neuron's Llama 3.1 8B example{fit}"
    return f"all cores of {run.instance}{fit}"


def shard_reason(run: Run, model: ModelFacts, instance: Instance, layout: Layout) -> str:
    """Why so many copies share the base weights (backend native)."""
    if model.architecture is None:
        return "all copies of a node share the base weights, because the model's size is unknown"
    if layout.shard_size == 1:
        return "each core holds the whole base model, so that no weights are exchanged"
    smaller = [size for size in instance.groups if size < layout.shard_size][-1]
    needed = layout_memory(run, model.architecture, instance, layout._replace(shard_size=smaller))
    return (
        f"copies that share the base weights and gather them layer by layer; the fewest that fit: {smaller} would use "
        f"{gib(needed.total)} of {gib(needed.hbm)} GiB per core"
    )


def micro_batch_reason(run: Run, model: ModelFacts, instance: Instance, layout: Layout) -> str:
    if model.architecture is None:
        return "default: the smallest graphs"
    twice = other_memory(run, model, instance, layout, per_device=2 * layout.per_device)
    return f"default: the smallest graphs compile fastest; 2 would use {gib(twice.total)} GiB per core" if twice else ""


def batch_choices(run: Run, wishes: Wishes, layout: Layout, micro_batch: str) -> list[Choice]:
    copies = copies_of(layout.data_parallel)
    if wishes.global_batch:
        accumulated = f"globalBatchSize {wishes.global_batch} / ({copies} x {layout.per_device})"
    elif run.backend == "native" and trainium(run.instance):
        at_once = layout.per_device * layout.data_parallel
        accumulated = f"default: a micro-batch has {number_of(at_once, 'row')}"
        if layout.accumulation > 1:
            accumulated = f"default: the fewest with {STEP_ROWS} rows per step"
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


def checkpointing_reason(run: Run, model: ModelFacts, instance: Instance, found: Candidate, layout: Layout) -> str:
    none = other_memory(run, model, instance, layout, checkpointing="none")
    if found.memory is None or none is None:
        return "default; memory is not checked, because the model's architecture is unknown"
    if layout.checkpointing == "full":
        return "recomputes whole layers; selective does not fit (see below)"
    if isinstance(none, NativeMemory) or isinstance(found.memory, NativeMemory):
        return f"recomputes the attention blocks, which saves {gib(none.total - found.memory.total)} GiB per core"
    if not keeps_scores(run.attention):
        return f"default; same as none, because {run.attention} attention keeps no scores"
    saved = none.activations + none.working - found.memory.activations - found.memory.working
    return f"recomputes attention scores, which saves {gib(saved)} GiB per core"


def other_memory(run: Run, model: ModelFacts, instance: Instance, layout: Layout, **other: Any) -> Memory | None:
    """The memory of a layout with other settings; None for an unknown model."""
    if model.architecture is None:
        return None
    return layout_memory(run, model.architecture, instance, layout._replace(**other))


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
        if run.backend == "native" and size < found.size:
            costs = f"tensorParallelSize {found.size} is {FROM_INPUTS}"
        yield Rejection(TENSOR_PARALLEL, size, f"{fit}, but {costs}", possible=True)


def rejected_settings(
    run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, layout: Layout
) -> Iterator[Rejection]:
    """The other shard sizes, attention, activation checkpointings and twice the micro-batch, by memory and FLOPs."""
    if model.architecture is None:
        return
    if run.backend == "native":
        yield from rejected_shards(run, wishes, model, instance, layout)
        yield rejected_attention(run, model.architecture, instance, layout)
    chosen = flops_per_token(model.architecture, run, layout).total
    for other in ("none", "selective", "full"):
        keeps_scores = run.attention == "isolated" or run.backend == "native"
        same = not keeps_scores and {other, layout.checkpointing} <= {"none", "selective"}
        needed = other_memory(run, model, instance, layout, checkpointing=other)
        if same or other == layout.checkpointing or needed is None:
            continue
        change = flops_per_token(model.architecture, run, layout._replace(checkpointing=other)).total / chosen - 1
        but = "leaves less room for memory that cannot be estimated" if change < 0 else "recomputes more than needed"
        reason = memory_reason(needed, but, f", {change:+.0%} FLOPs")
        if wishes.checkpointing:
            reason += f"; {layout.checkpointing} is {FROM_INPUTS}"
        yield Rejection(CHECKPOINTING, other, reason, possible=needed.fits)
    twice = other_memory(run, model, instance, layout, per_device=2 * layout.per_device)
    if twice and not twice.fits:
        yield Rejection(PER_DEVICE, 2 * layout.per_device, memory_reason(twice))


def memory_reason(needed: Memory, but: str = "", change: str = "") -> str:
    """Why a setting that needs this memory is not chosen. ``but``: the reason if it fits."""
    if needed.fits:
        return f"works ({gib(needed.total)} GiB per core{change}), but {but}"
    return f"does not fit: {gib(needed.total)} of {gib(needed.hbm)} GiB per core"


def rejected_shards(
    run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, layout: Layout
) -> Iterator[Rejection]:
    """The other numbers of copies that could share the base weights."""
    for size in shard_sizes(run, wishes._replace(shard_size=None), instance, layout):
        needed = other_memory(run, model, instance, layout, shard_size=size)
        if size == layout.shard_size or needed is None:
            continue
        asked = f"shardSize {layout.shard_size} is {FROM_INPUTS}"
        reason = memory_reason(needed, asked if wishes.shard_size else "weights are gathered from more cores")
        yield Rejection(SHARD_SIZE, size, reason, possible=needed.fits)


def rejected_attention(run: Run, architecture: Architecture, instance: Instance, layout: Layout) -> Rejection:
    """The attention that is not chosen."""
    other = run._replace(attention="causal" if run.attention == "isolated" else "isolated")
    if problem := next(length_problems(other, architecture), None):
        return Rejection(ATTENTION, other.attention, problem.what)
    needed = layout_memory(other, architecture, instance, layout)
    but = "the scores of a whole row are computed"
    if other.attention == "causal":
        but = "each packed example attends to those before it in its row"
    return Rejection(ATTENTION, other.attention, memory_reason(needed, but), possible=needed.fits)
