"""The layout and batch of a run: each choice with its reason, each alternative with the rule it violates."""

from __future__ import annotations

import math
from dataclasses import replace

from genvalues.accelerators import native_rules, neuron_rules
from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance, refusal, trainium
from genvalues.accelerators.neuron_rules import SHARD_SIZE, TENSOR_PARALLEL, group_problems
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import number_of
from genvalues.planner.candidates import SHARD, SIZE, batch, candidate, host_memory_note, length_problems
from genvalues.planner.estimate import START_HOURS, compile_hours, hours_to_finish
from genvalues.planner.layout import Choice, Chosen, Layout, Note, Refused, Rejection, Run, Wishes, choice
from genvalues.planner.models import ModelFacts
from genvalues.planner.reasons import batch_choices, layout_choices, rejected_settings, rejected_sizes
from genvalues.planner.refusals import refused

MOST_NODES = 64  # tried for parallelism.maxHours
MAX_HOURS = key_paths("parallelism.maxHours")


def choose(run: Run, wishes: Wishes, model: ModelFacts) -> Chosen:
    """The layout for a run. Raises Refused."""
    instance = trainium(run.instance)
    if instance is None:
        return on_cpu(run, wishes)
    if architecture := model.architecture:
        unsupported = (
            native_rules.model_problems(architecture)
            if run.backend == "native"
            else neuron_rules.model_problems(architecture)
        )
        refuse(*(replace(each, what=f"{model.name}: {each.what}") for each in unsupported))
        refuse(*length_problems(run, architecture))
    if run.backend == "native" and wishes.shard_size:
        copies = (wishes.nodes or 1) * instance.cores // (wishes.tensor_parallel or 1)
        refuse(*group_problems(run.instance, wishes.shard_size, SHARD_SIZE, copies))
    if wishes.max_hours is not None:
        return fewest_nodes(run, wishes, model, instance, wishes.max_hours)
    chosen = arrange(run, wishes, model, instance, wishes.nodes or 1)
    nodes = choice("nodes", chosen.layout.nodes, wishes.nodes, "default: neither nodes nor parallelism.maxHours is set")
    return chosen._replace(choices=(nodes, *chosen.choices))


def on_cpu(run: Run, wishes: Wishes) -> Chosen:
    """One copy of the model in each process, unless the inputs divide it.

    Memory is not checked: models for the CPU are small, and so is the machine's.
    """
    nodes, size, shard = wishes.nodes or 1, wishes.tensor_parallel or 1, wishes.shard_size or 1
    copies, rest = divmod(nodes * run.cpu_processes, size)
    if rest:
        what = f"{size} does not divide the {nodes * run.cpu_processes} processes (nodes x cpu.processes)"
        raise Refused(Problem((SIZE,), what, "Set it to a divisor, or remove it."))
    if copies % shard:
        raise Refused(Problem((SHARD,), f"{shard} does not divide {copies} copies of the model", "Use a divisor."))
    if wishes.max_hours is not None:
        raise Refused(Problem(MAX_HOURS, "requires Trainium: a CPU's speed is unknown", "Remove it."))
    per_device, accumulation = batch(run, wishes, copies)
    layout = Layout(
        nodes, run.cpu_processes, size, copies, per_device, accumulation, wishes.checkpointing or "selective", shard
    )
    by_size = "" if size == 1 else f" / {size}"
    choices = [
        choice("nodes", nodes, wishes.nodes, "default"),
        choice(TENSOR_PARALLEL, size, wishes.tensor_parallel, "default on the CPU"),
        Choice(
            "parallelism.dataParallelSize",
            copies,
            f"{number_of(nodes, 'node')} x {run.cpu_processes} processes{by_size}",
        ),
        choice(SHARD_SIZE, shard, wishes.shard_size, "default on the CPU"),
        *batch_choices(run, wishes, layout, "default"),
        choice(
            "training.activationCheckpointing",
            layout.checkpointing,
            wishes.checkpointing,
            "default; on the CPU selective recomputes nothing",
        ),
    ]
    return Chosen(layout, tuple(choices), (), None)


def fewest_nodes(run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, most_hours: float) -> Chosen:
    """The fewest nodes that finish in parallelism.maxHours, by the upper end of the estimate."""
    # More nodes are faster only if a step keeps the rows that it has on one node.
    rows = wishes.global_batch or arrange(run, wishes, model, instance, 1).layout.global_batch
    tried: list[Rejection] = []
    for nodes in [wishes.nodes] if wishes.nodes else range(1, MOST_NODES + 1):
        if reason := refusal(run.instance, nodes):
            tried.append(Rejection("nodes", nodes, reason))
            break
        kept = wishes
        if wishes.global_batch is None and wishes.accumulation is None:
            kept = wishes._replace(accumulation=shared_accumulation(rows, run, wishes, instance, nodes))
        try:
            found = arrange(run, kept, model, instance, nodes)
        except Refused as error:
            if wishes.nodes or nodes == 1:
                raise
            tried.append(Rejection("nodes", nodes, str(error)))
            continue
        needed = known_hours(run, model.architecture, instance, found.layout)
        estimated = f"{needed[0]:.1f} to {needed[1]:.1f} h (estimate)"
        if needed[1] <= most_hours:
            least = "" if wishes.nodes else "the fewest that finish in time: "
            reason = f"{least}{estimated}, within parallelism.maxHours {most_hours:g}"
            first = Choice("nodes", nodes, reason, wished=wishes.nodes is not None)
            return found._replace(choices=(first, *found.choices), rejected=(*tried, *found.rejected))
        tried.append(Rejection("nodes", nodes, f"takes {estimated}, more than parallelism.maxHours {most_hours:g}"))
    raise too_slow(run, wishes, most_hours, tried)


def known_hours(run: Run, architecture: Architecture | None, instance: Instance, layout: Layout) -> tuple[float, float]:
    """Raises Refused where the duration is unknown."""
    needed = hours_to_finish(architecture, run, instance, layout) if architecture else None
    if needed is None:
        unknown = "the number of steps" if architecture else "the model's architecture"
        fix = "Set training.maxSteps, or nodes instead of maxHours."
        raise Refused(Problem(MAX_HOURS, f"the run's duration cannot be estimated: {unknown} is unknown", fix))
    return needed


def too_slow(run: Run, wishes: Wishes, most_hours: float, tried: list[Rejection]) -> Refused:
    """No number of nodes finishes in time."""
    slow = [each for each in tried if each.reason.startswith("takes")]
    nearest, last = (slow or tried)[-1], tried[-1]
    limit = "" if last is nearest else f"; {last.reason}"
    if last is nearest and last.value == MOST_NODES and not wishes.nodes:
        limit = f"; more than {MOST_NODES} nodes are not tried; to use more, set nodes"
    if compile_hours(run)[1] + START_HOURS[1] > most_hours:
        fix = "Increase or remove it: compiling and starting take longer."
    elif last is not nearest or wishes.nodes:
        fix = "Increase or remove it, or train fewer steps."
    else:
        fix = "Increase or remove it, train fewer steps, or increase training.globalBatchSize."
    subject = f"the run on {number_of(float(nearest.value), 'node')} " if slow else ""
    return Refused(Problem(MAX_HOURS, f"{subject}{nearest.reason}{limit}", fix))


def shared_accumulation(rows: int, run: Run, wishes: Wishes, instance: Instance, nodes: int) -> int:
    """Micro-batches of so many nodes whose steps take at least ``rows``."""
    size = wishes.tensor_parallel or usual_size(run, instance)
    copies = max(1, nodes * instance.cores // size)
    return max(1, math.ceil(rows / (copies * (wishes.per_device or 1))))


def usual_size(run: Run, instance: Instance) -> int:
    """The tensor-parallel size to try first.

    Backend xla: that of optimum-neuron's examples. Native: 1, because tensor parallelism exchanges activations twice in
    each layer, in the forward and in the backward pass, and FSDP gathers weights ahead of time.
    """
    return 1 if run.backend == "native" else min(instance.cores, instance.generation.tensor_parallel)


def arrange(run: Run, wishes: Wishes, model: ModelFacts, instance: Instance, nodes: int) -> Chosen:
    """Layout and batch on a number of nodes, without the choice of nodes. Raises Refused."""
    usual = usual_size(run, instance)
    larger = [size for size in instance.groups if size > usual]
    smaller = [size for size in reversed(instance.groups) if size < usual]
    order = dict.fromkeys([usual, *larger, *smaller, wishes.tensor_parallel or usual])
    tried = {size: candidate(run, wishes, model.architecture, instance, nodes, size) for size in order}
    if wishes.tensor_parallel:
        found = tried[wishes.tensor_parallel]
    else:
        found = next((each for each in tried.values() if each.works), tried[usual])
    layout = found.layout
    if not found.works or layout is None:
        raise refused(run, wishes, model, instance, nodes, found, list(tried.values()))
    return Chosen(
        layout,
        tuple(layout_choices(run, wishes, model, instance, found, layout, tried[usual])),
        (*rejected_sizes(run, instance, found, tried), *rejected_settings(run, wishes, model, instance, layout)),
        found.memory,
        tuple(filter(None, [model_note(run, model, instance, found.size)])),
    )


def model_note(run: Run, model: ModelFacts, instance: Instance, size: int) -> Note | None:
    if model.architecture:
        return host_memory_note(run, model.architecture, instance, size)
    text = (
        f"The architecture of {model.name} is unknown: {model.unknown}. Its heads and memory are not checked here; "
        "the stage tokenize checks the heads before Trainium nodes start."
    )
    return Note(("model",), text)


def refuse(*problems: Problem) -> None:
    """Raise Refused if there are problems."""
    if problems:
        raise Refused(*problems)
