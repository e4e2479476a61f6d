"""Layout and batch of a run: each choice with its reason, each alternative that is not taken with the rule it broke."""

from __future__ import annotations

import math
from collections.abc import Callable

from genvalues.accelerators.instances import Instance, refusal, trainium
from genvalues.planner.candidates import batch, candidate, host_memory
from genvalues.planner.layout import Choice, Chosen, Layout, Note, Problem, Refused, Rejection, Run, Wishes
from genvalues.planner.models import Model
from genvalues.planner.reasons import (
    batch_choices,
    checkpointing_reason,
    copies_of,
    micro_batch_reason,
    rejected_settings,
    rejected_sizes,
    size_reason,
)
from genvalues.planner.refusals import refused

MOST_NODES = 64  # that parallelism.maxHours is answered with


def choose(
    run: Run,
    wishes: Wishes,
    model: Model,
    hours: Callable[[Layout], tuple[float, float] | None],
    least: float | None = None,
) -> Chosen:
    """The layout for a run. ``hours`` estimates a layout's training, None where that cannot be. Raises Refused.

    ``least``: see ``fewest_nodes``.
    """
    instance = trainium(run.instance)
    if instance is None:
        return on_cpu(run, wishes)
    if model.architecture and (refusals := model.architecture.refusals):
        raise Refused(*(Problem(("model",), f"{model.name}: {what}", fix) for what, fix in refusals))
    if wishes.max_hours is None:
        nodes = wishes.nodes or 1
        reason = "" if wishes.nodes else "one, where the inputs say neither nodes nor parallelism.maxHours"
        return arrange(run, wishes, model, instance, nodes, reason)
    return fewest_nodes(run, wishes, model, instance, hours, least)


def on_cpu(run: Run, wishes: Wishes) -> Chosen:
    """Data parallel only; nothing is counted: the models of the CPU are small, and its memory the machine's."""
    nodes = wishes.nodes or 1
    copies = nodes * run.cpu_processes
    if wishes.tensor_parallel not in (None, 1):
        raise Refused(
            Problem(
                ("parallelism", "tensorParallelSize"),
                f"{wishes.tensor_parallel}, but backend cpu is data parallel only",
                "Write 1, or remove it.",
            )
        )
    if wishes.max_hours is not None:
        raise Refused(Problem(("parallelism", "maxHours"), "is for Trainium: a CPU's speed is not known", "Remove it."))
    per_device, accumulation = batch(run, wishes, copies)
    layout = Layout(nodes, run.cpu_processes, 1, copies, per_device, accumulation, wishes.checkpointing or "selective")
    choices = [
        Choice("nodes", nodes, "as written" if wishes.nodes else "one, where nothing is written", bool(wishes.nodes)),
        Choice("parallelism.tensorParallelSize", 1, "backend cpu is data parallel only"),
        Choice("parallelism.dataParallelSize", copies, f"{nodes} x {run.cpu_processes} processes (cpu.processes)"),
        *batch_choices(run, wishes, layout, ""),
        Choice(
            "training.activationCheckpointing",
            layout.checkpointing,
            "as written" if wishes.checkpointing else "the default; on the CPU selective recomputes nothing",
            bool(wishes.checkpointing),
        ),
    ]
    return Chosen(layout, tuple(choices), (), None)


def fewest_nodes(
    run: Run,
    wishes: Wishes,
    model: Model,
    instance: Instance,
    hours: Callable[[Layout], tuple[float, float] | None],
    least: float | None = None,
) -> Chosen:
    """The fewest nodes that are estimated to finish in parallelism.maxHours, by the estimate's upper end.

    ``least`` are the hours, at the upper end, that no fewer steps and no more nodes shorten.
    """
    where, most = ("parallelism", "maxHours"), wishes.max_hours or 0.0
    # More nodes are faster where a step's rows stay as many as one node's would be.
    rows = wishes.global_batch or arrange(run, wishes, model, instance, 1, "").layout.global_batch
    tried: list[Rejection] = []
    for nodes in [wishes.nodes] if wishes.nodes else range(1, MOST_NODES + 1):
        if reason := refusal(run.instance, nodes):
            tried.append(Rejection("nodes", nodes, reason))
            break
        kept = wishes._replace(accumulation=wishes.accumulation or sharing(rows, wishes, instance, nodes))
        try:
            found = arrange(run, kept if wishes.global_batch is None else wishes, model, instance, nodes, "")
        except Refused as refused:
            if wishes.nodes or nodes == 1:
                raise
            tried.append(Rejection("nodes", nodes, str(refused)))
            continue
        needed = hours(found.layout)
        if needed is None:
            raise Refused(
                Problem(
                    where,
                    "how long the run takes is not known: its rows and training.maxSteps, or the model, are not",
                    "Write training.maxSteps, or nodes instead of maxHours.",
                )
            )
        said = f"{needed[0]:.1f} to {needed[1]:.1f} h by estimate"
        if needed[1] <= most:
            wished = wishes.nodes is not None
            reason = f"{said}, within parallelism.maxHours {most:g}" + ("" if wished else "; the fewest that are")
            first = found.choices[0]._replace(reason=reason, wished=wished)
            return found._replace(choices=(first, *found.choices[1:]), rejected=(*tried, *found.rejected))
        tried.append(Rejection("nodes", nodes, f"takes {said}, more than parallelism.maxHours {most:g}"))
    slow = [each for each in tried if each.rule.startswith("takes")]
    nearest, last = (slow or tried)[-1], tried[-1]
    limit = "" if last is nearest else f"; {last.rule}"
    if last is nearest and last.value == MOST_NODES and not wishes.nodes:
        limit = f"; more than {MOST_NODES} nodes are not looked at (write nodes for more)"
    if least is not None and least > most:
        fix = "Write more hours, or remove it: compiling and starting alone take longer."
    elif last is not nearest or wishes.nodes:
        fix = "Write more hours or fewer steps, or remove it."
    else:
        fix = "Write more hours, fewer steps, a larger training.globalBatchSize, or remove it."
    raise Refused(
        Problem(
            where,
            f"{nearest.value} node{'s' if nearest.value != 1 else ''}: {nearest.rule}{limit}",
            fix,
        )
    )


def sharing(rows: int, wishes: Wishes, instance: Instance, nodes: int) -> int:
    """Accumulation that keeps a step at about so many rows on more nodes."""
    size = wishes.tensor_parallel or min(instance.cores, instance.generation.tensor_parallel)
    copies = max(1, nodes * instance.cores // size)
    return max(1, math.ceil(rows / (copies * (wishes.per_device or 1))))


def arrange(run: Run, wishes: Wishes, model: Model, instance: Instance, nodes: int, nodes_reason: str) -> Chosen:
    """Layout and batch on so many nodes. Raises Refused."""
    generation = instance.generation
    groups = [size for size in generation.groups if size <= instance.cores]
    usual = min(instance.cores, generation.tensor_parallel)
    order = [usual, *(size for size in groups if size > usual), *(size for size in reversed(groups) if size < usual)]
    if wishes.tensor_parallel and wishes.tensor_parallel not in order:
        order.append(wishes.tensor_parallel)
    tried = {size: candidate(run, wishes, model.architecture, instance, nodes, size) for size in order}
    if wishes.tensor_parallel:
        found = tried[wishes.tensor_parallel]
    else:
        found = next((each for each in tried.values() if each.works), tried[usual])
    if not found.works or found.layout is None:
        raise refused(run, wishes, model, instance, nodes, found, list(tried.values()))
    layout = found.layout
    rejected = [*rejected_sizes(found, tried, instance), *rejected_settings(run, wishes, model, instance, found)]
    choices = [
        Choice("nodes", nodes, nodes_reason or "as written", wished=wishes.nodes is not None),
        Choice(
            "parallelism.tensorParallelSize",
            found.size,
            size_reason(found, usual, wishes, instance, run.instance),
            wished=wishes.tensor_parallel is not None,
        ),
        Choice(
            "parallelism.dataParallelSize",
            layout.data_parallel,
            f"copies of the model, each with rows of its own: {nodes} x {instance.cores} cores / {found.size}",
        ),
        *batch_choices(run, wishes, layout, micro_batch_reason(run, model, instance, found)),
        Choice(
            "training.activationCheckpointing",
            layout.checkpointing,
            checkpointing_reason(run, wishes, model, instance, found),
            wished=wishes.checkpointing is not None,
        ),
        Choice(
            "sequence parallelism",
            "on" if found.size > 1 else "off",
            "always on with tensor parallelism: what is not cut by heads is cut by tokens, and gradients stay right",
        ),
        Choice(
            "ZeRO-1",
            "on",
            f"always: AdamW's fp32 weights and moments are shared out over {copies_of(layout.data_parallel)} "
            "(the base is frozen and has none)",
        ),
    ]
    notes = []
    if model.architecture and (tight := host_memory(model.architecture, instance, found.size)):
        notes.append(Note(("instance",), tight, warns=False))  # a guess, with what nobody has measured in it
    if model.architecture is None:
        unknown = (
            f"The architecture of {model.name} is not known: {model.unknown}. Neither its heads nor memory are "
            "checked here; the stage tokenize checks heads before a Trainium node is asked for."
        )
        notes.append(Note(("model",), unknown))
    return Chosen(layout, tuple(choices), tuple(rejected), found.memory, tuple(notes))
