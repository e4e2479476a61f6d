"""One tensor-parallel size on so many nodes: its batch, its memory, and the rules that it breaks.

The rules of models are those that the Neuron backend checks again before it trains
(trainer/llama_lora/backends/neuron/rules.py, where each has the function of optimum-neuron 0.4.5 or NxD it is from).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import BF16, QUERY_KEY_VALUE, Memory, memory, weights
from genvalues.common.text import KeyPath, number_of
from genvalues.planner.layout import Layout, Note, Problem, Refused, Run, Wishes

FLASH_HEAD = 128  # NKI's flash attention takes heads of up to 128 (rules.py)
ACCUMULATION = 3  # of the seed's example: 12 rows a step on one trn1.32xlarge
CHECKPOINTING = ("selective", "full")  # in this order where neither is asked for
GIB = 1 << 30
# Of a worker's memory on the host: torch alone has 0.5 GiB resident (measured), torch-xla, NxD and the runtime more. A
# guess, as is the share of a pod's memory that loading should leave to what is read and to /dev/shm.
LIBRARIES_GIB = 3
HOST_SHARE = 0.75


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

    def text(self, kind: str) -> str:
        """Its first problem of that kind."""
        return next(text for each, text in self.problems if each == kind)


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
    parts = [
        "1 copy of the model" if copies == 1 else f"{copies} copies of the model",
        f"{per_device or 1} a time (perDeviceBatchSize)",
    ]
    if accumulation:
        parts.append(f"{accumulation} times (gradientAccumulationSteps)")
    fitting = " or ".join(str(rows) for rows in sorted({lower, upper}) if rows)
    if accumulation and per_device:
        fitting = str(unit)
    raise Refused(
        Problem(
            ("training", "globalBatchSize"),
            f"{number_of(wanted, 'row')} a step cannot be shared out: {', '.join(parts)}",
            f"Write {fitting}.",
        )
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


def host_memory(architecture: Architecture, instance: Instance, size: int) -> str:
    """A word where loading the model may leave a pod too little memory: each worker reads its part on the host."""
    needed = instance.cores * (BF16 * weights(architecture, size) / GIB + LIBRARIES_GIB)
    if needed < HOST_SHARE * instance.request_memory_gib:
        return ""
    return (
        f"Loading the model takes about {needed:.0f} of the {instance.request_memory_gib} GiB that the pod of a node "
        f"has: {instance.cores} workers, each with its part and {LIBRARIES_GIB} GiB of libraries. It may be too tight."
    )


def too_few_rows(
    layout: Layout, rows: tuple[int, int] | None, total: int | None, wishes: Wishes, processes: int | None = None
) -> Note | None:
    """A word where a step takes more rows than the dataset has, at the key that makes it so.

    ``total`` are the rows of all epochs, None with training.maxSteps, where rows come round again
    (trainer/llama_lora/plan.py, step_rows). ``processes`` is cpu.processes, where it is written.
    """
    if rows is None or layout.global_batch <= rows[1]:
        return None
    happens = "rows come round again within a step"
    if total is not None and layout.global_batch > total:
        padding = layout.global_batch - total
        happens = f"the run is one step, and {padding} of its rows {'is' if padding == 1 else 'are'} padding"
    key: KeyPath
    fix = "A smaller batch, or more data, is better"
    if wishes.global_batch:
        key = ("training", "globalBatchSize")
    elif layout.accumulation > 1:
        key = ("training", "gradientAccumulationSteps")
    elif layout.per_device > 1:
        key = ("training", "perDeviceBatchSize")
    elif layout.nodes > 1:
        key, fix = ("nodes",), "Fewer do the same"
    elif processes:
        key, fix = ("cpu", "processes"), "Fewer do the same; more data is better"
    else:
        key, fix = ("dataset", "source"), "The copies of the model alone are more than the rows: use more data"
    return Note(key, f"A step takes {layout.global_batch} rows, and the dataset has {rows[1]}: {happens}. {fix}.")


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
