"""Layout and batch of a run: each choice with its reason, each alternative that is not taken with the rule it broke.

The rules of models are those that the Neuron backend checks again before it trains
(trainer/llama_lora/backends/neuron/rules.py, where each has the function of optimum-neuron 0.4.5 or NxD it is from).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from genvalues.contradictions import FLASH_ROWS
from genvalues.instances import HYPERPOD, TRAINIUM, Instance, refusal, trainium
from genvalues.plan.architectures import Architecture
from genvalues.plan.memory import BF16, QUERY_KEY_VALUE, Memory, Step, memory, weights
from genvalues.plan.models import Model
from genvalues.wording import KeyPath

FLASH_HEAD = 128  # NKI's flash attention takes heads of up to 128 (rules.py)
ACCUMULATION = 3  # of the seed's example: 12 rows a step on one trn1.32xlarge
CHECKPOINTING = ("selective", "full")  # in this order where neither is asked for
MOST_NODES = 64  # that parallelism.maxHours is answered with
GIB = 1 << 30
# Of a worker's memory on the host: torch alone has 0.5 GiB resident (measured), torch-xla, NxD and the runtime more. A
# guess, as is the share of a pod's memory that loading should leave to what is read and to /dev/shm.
LIBRARIES_GIB = 3
HOST_SHARE = 0.75


class Wishes(NamedTuple):
    """What the inputs say; None: to be chosen."""

    nodes: int | None = None
    tensor_parallel: int | None = None
    max_hours: float | None = None
    per_device: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    checkpointing: str | None = None


class Run(NamedTuple):
    """What is given: the settings that nothing is chosen about. ``rows`` are fewest and most, where they are known."""

    instance: str
    length: int
    attention: str
    r: int
    targets: tuple[str, ...]
    dropout: bool
    rows: tuple[int, int] | None = None
    cpu_processes: int = 2

    def step(self, per_device: int, checkpointing: str) -> Step:
        return Step(self.length, per_device, self.attention, checkpointing, self.r, self.targets, self.dropout)


class Layout(NamedTuple):
    """How the processes divide the work, and how many rows a step has."""

    nodes: int
    processes_per_node: int
    tensor_parallel: int
    data_parallel: int
    per_device: int
    accumulation: int
    checkpointing: str

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device * self.accumulation * self.data_parallel


class Choice(NamedTuple):
    """A key of the inputs (or what follows from them), its value, and why. ``wished``: the inputs say so."""

    key: str
    value: str | int | float
    reason: str
    wished: bool = False


class Rejection(NamedTuple):
    """An alternative, and the rule that it breaks or why another is better. ``possible``: it would work."""

    key: str
    value: str | int | float
    rule: str
    possible: bool = False


class Problem(NamedTuple):
    """A wish that cannot work, or a run that cannot: where, why, and what to write instead."""

    key: KeyPath
    what: str
    fix: str


class Note(NamedTuple):
    """What to know of a plan, and the key it is about. ``warns``: where values are written, too."""

    key: KeyPath
    text: str
    warns: bool = True


class Refused(Exception):
    """There is no layout for the wishes."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.what for problem in problems))
        self.problems = problems


class Chosen(NamedTuple):
    layout: Layout
    choices: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    memory: Memory | None
    notes: tuple[Note, ...] = ()


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


# --- one number of nodes


class Candidate(NamedTuple):
    """A tensor-parallel size, with what is wrong with it: (kind, text) in the order of the rules."""

    size: int
    problems: tuple[tuple[str, str], ...]
    layout: Layout | None = None
    memory: Memory | None = None

    @property
    def works(self) -> bool:
        return not self.problems

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.problems}


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
            f"always: AdamW's fp32 weights and moments are shared out over the {layout.data_parallel} copies "
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


def host_memory(architecture: Architecture, instance: Instance, size: int) -> str:
    """A word where loading the model may leave a pod too little memory: each worker reads its part on the host."""
    needed = instance.cores * (BF16 * weights(architecture, size) / GIB + LIBRARIES_GIB)
    if needed < HOST_SHARE * instance.request_memory_gib:
        return ""
    return (
        f"Loading the model takes about {needed:.0f} of the {instance.request_memory_gib} GiB that the pod of a node "
        f"has: {instance.cores} workers, each with its part and {LIBRARIES_GIB} GiB of libraries. It may be too tight."
    )


def candidate(
    run: Run, wishes: Wishes, architecture: Architecture | None, instance: Instance, nodes: int, size: int
) -> Candidate:
    """A size with its batch and its memory, tried with the first recomputation that fits."""
    problems = list(size_problems(run, architecture, instance, size))
    if nodes * instance.cores % size:
        return Candidate(size, tuple(problems))
    copies = nodes * instance.cores // size
    try:
        per_device, accumulation = batch(run, wishes, copies)
    except Refused as refused:
        return Candidate(size, (*problems, ("batch", refused.problems[0].what)))
    first = wishes.checkpointing or CHECKPOINTING[0]
    layout = Layout(nodes, instance.cores, size, copies, per_device, accumulation, first)
    if architecture is None or problems:
        return Candidate(size, tuple(problems), layout)
    for checkpointing in [wishes.checkpointing] if wishes.checkpointing else CHECKPOINTING:
        layout = layout._replace(checkpointing=checkpointing)
        counted = memory(architecture, run.step(per_device, checkpointing), size, copies, instance.hbm)
        if counted.fits:
            return Candidate(size, (), layout, counted)
    return Candidate(size, (("memory", needs(counted, layout)),), layout, counted)


def size_problems(
    run: Run, architecture: Architecture | None, instance: Instance, size: int
) -> Iterator[tuple[str, str]]:
    """What forbids a group of so many workers, as "TP 16 ..." goes on."""
    generation = instance.generation
    groups = [group for group in generation.groups if group <= instance.cores]
    if size not in groups:
        yield "groups", f"is no group of processes on {generation.target} ({', '.join(map(str, groups))} are)"
    if architecture is None:
        return
    a = architecture
    if run.length % size:
        yield "length", f"does not divide the {run.length} tokens of a row, which sequence parallelism cuts"
    if a.heads % size:
        yield "heads", f"does not divide {a.heads} attention heads"
    if a.kv_heads % size and size % a.kv_heads:
        yield "heads", f"and {a.kv_heads} key-value heads: neither divides the other"
    if a.intermediate % size:
        yield "heads", f"does not divide the intermediate size {a.intermediate}"
    if a.model_type != "granite" and a.vocabulary % size:  # Granite's is not cut
        yield "heads", f"does not divide the vocabulary of {a.vocabulary}"
    if generation.target == "trn2" and 1 < a.kv_heads < size:
        yield (
            "heads",
            f"is more than {a.kv_heads} key-value heads, whose copies' gradients optimum-neuron 0.4.5 adds up "
            "wrongly on trn2",
        )
    named = [name for name in QUERY_KEY_VALUE if name in run.targets]
    if a.kv_heads % size and 0 < len(named) < len(QUERY_KEY_VALUE):
        yield (
            "targets",
            f"copies {a.kv_heads} key-value heads, and then q_proj, k_proj and v_proj get LoRA together or not at all "
            f"(lora.targetModules has {' and '.join(named)})",
        )


def batch(run: Run, wishes: Wishes, copies: int) -> tuple[int, int]:
    """(rows at once of a copy, micro-batches of a step). Raises Refused where the wishes contradict one another."""
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
    unit = (per_device or 1) * copies * (accumulation or 1)
    lower, upper = wanted // unit * unit, -(-wanted // unit) * unit
    parts = [f"{copies} copies of the model", f"{per_device or 1} a time (perDeviceBatchSize)"]
    if accumulation:
        parts.append(f"{accumulation} times (gradientAccumulationSteps)")
    fitting = " or ".join(str(rows) for rows in sorted({lower, upper}) if rows)
    if accumulation and per_device:
        fitting = str(unit)
    raise Refused(
        Problem(
            ("training", "globalBatchSize"),
            f"{wanted} rows a step cannot be shared out: {', '.join(parts)}",
            f"Write {fitting}.",
        )
    )


def too_few_rows(layout: Layout, rows: tuple[int, int] | None, total: int | None, wishes: Wishes) -> Note | None:
    """A word where a step takes more rows than the dataset has, at the key that makes it so.

    ``total`` are the rows of all epochs, None with training.maxSteps, where rows come round again
    (trainer/llama_lora/plan.py, step_rows).
    """
    if rows is None or layout.global_batch <= rows[1]:
        return None
    happens = "rows come round again within a step"
    if total is not None and layout.global_batch > total:
        happens = f"the run is one step, and {layout.global_batch - total} of its rows are padding"
    if wishes.global_batch:
        key: KeyPath = ("training", "globalBatchSize")
    elif layout.accumulation > 1:
        key = ("training", "gradientAccumulationSteps")
    else:
        key = ("training", "perDeviceBatchSize") if layout.per_device > 1 else ("nodes",)
    fix = "Fewer do the same" if key == ("nodes",) and layout.nodes > 1 else "A smaller batch, or more data, is better"
    if key == ("nodes",) and layout.nodes == 1:
        fix = "The copies of the model alone are more than the rows: use more data"
    return Note(key, f"A step takes {layout.global_batch} rows, and the dataset has {rows[1]}: {happens}. {fix}.")


# --- reasons


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
    copies = f"{layout.per_device} x {layout.accumulation} x {layout.data_parallel} copies"
    if wishes.accumulation:
        accumulated = "as written"
    elif wishes.global_batch:
        accumulated = f"globalBatchSize {wishes.global_batch} / ({layout.data_parallel} copies x {layout.per_device})"
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
    from genvalues.plan.estimate import flops_per_token

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


def needs(counted: Memory, layout: Layout) -> str:
    return (
        f"needs {gib(counted.total)} of {gib(counted.hbm)} GiB a core with activationCheckpointing "
        f"{layout.checkpointing} (weights {gib(counted.weights)}, activations {gib(counted.activations)}, logits "
        f"{gib(counted.logits)}, one layer's work {gib(counted.working)}, reserved {gib(counted.reserved)})"
    )


def gib(number: float) -> str:
    """1.9; small ones with two figures: 0.08"""
    value = number / GIB
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


# --- refusals


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


def length_problems(run: Run, architecture: Architecture | None) -> Iterator[Problem]:
    """Rows that are longer than the model knows positions, and heads that flash attention does not take."""
    if architecture is None:
        return
    if run.length > architecture.positions:
        yield Problem(
            ("training", "maxSequenceLength"),
            f"{run.length} is more than the {architecture.positions} positions the model knows",
            f"Write {architecture.positions} or less.",
        )
    if run.attention == "flash" and architecture.head > FLASH_HEAD:
        yield Problem(
            ("training", "attention"),
            f"flash takes heads of up to {FLASH_HEAD}, the model's have {architecture.head}",
            "Write eager.",
        )
