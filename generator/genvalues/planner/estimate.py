"""Operations, hours and dollars of a run before it runs: ranges, and the assumptions they stand on."""

from __future__ import annotations

import math
from typing import NamedTuple

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import Step
from genvalues.common.text import number_of
from genvalues.planner.prices import Price

Range = tuple[float, float]

# The share of a core's peak that training reaches. AWS has measured 41.99 rows of 8192 tokens a second on 32
# trn1.32xlarge for the pre-training of Llama 3.1 8B (Neuron docs, Trn1/Trn1n Training Performance, 2025-05-20): 344,000
# tokens a second x 61 GFLOP (6 a parameter, 12 L s q for attention: PaLM, arXiv:2204.02311, appendix B) are 22 % of
# 32 x 16 x 190 TFLOPS, with rows four times as long and fewer operations lost between the kernels. Nobody has published
# what LoRA with eager attention and one row a core reaches; the lower end is our assumption.
UTILIZATION: Range = (0.08, 0.22)
# Hours on each Trainium node. optimum-neuron's guide cache_system: 30 to 60 minutes to compile a large model's graphs
# from scratch. With the graphs in the cache it is the trial run alone.
COMPILE_HOURS: Range = (0.5, 1.0)
COLLECT_HOURS: Range = (0.1, 0.3)  # compile.runsOn cpu: the nodes trace the graphs, a CPU node compiles them
START_HOURS: Range = (0.1, 0.3)  # a pod's start, reading the model from FSx, loading the graphs: our assumption
# A CPU node with 16 vCPU, in bf16 with torch. The lower end is what the probe took on two busy cores (docs/neuron.md,
# 135M parameters: 1 TFLOP in 75 to 100 s), times eight; the upper end supposes AMX.
CPU_FLOPS: Range = (0.1e12, 1.5e12)
DOWNLOAD: Range = (100e6, 500e6)  # bytes a second, from the Hub, S3 and FSx, to a pod


class Flops(NamedTuple):
    """Operations for one token of a training step, by where they go."""

    forward: float
    backward: float
    again: float
    lora: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again + self.lora


def flops_per_token(architecture: Architecture, step: Step) -> Flops:
    """Two operations for each parameter a token is multiplied with (Kaplan et al. 2020, arXiv:2001.08361, table 1).

    forward: 2 P, and attention's two products with s tokens, 4 s q a layer (flash: the causal half). backward: the
    same again for the gradients of activations, and twice attention's; the frozen base has no gradients of weights,
    which is what LoRA saves of the usual 4 P. LoRA's own parameters have both. again: what is recomputed (attention's
    products when selective, all layers when full; Korthikanti et al. 2022, section 5).
    """
    a = architecture
    linear = 2.0 * a.matrix_parameters
    products = 4.0 * a.layers * a.query * step.length * (0.5 if step.attention == "flash" else 1)
    again = 0.0
    if step.checkpointing == "selective" and step.attention == "eager":
        again = products
    elif step.checkpointing == "full":
        again = 2.0 * a.layers * a.layer_linear_parameters + products
    return Flops(
        forward=linear + products,
        backward=linear + 2 * products,
        again=again,
        lora=6.0 * a.lora_parameters(step.r, step.targets),
    )


class Work(NamedTuple):
    """How much there is to train: ``steps`` of ``global_batch`` rows, None where nobody knows, and from what."""

    steps: tuple[int, int] | None
    global_batch: int
    length: int
    reason: str

    @property
    def tokens(self) -> tuple[int, int] | None:
        if self.steps is None:
            return None
        fewest, most = self.steps
        return fewest * self.global_batch * self.length, most * self.global_batch * self.length


def work(
    rows: tuple[int, int] | None, epochs: float, max_steps: int | None, global_batch: int, length: int, unknown: str
) -> Work:
    """As trainer/llama_lora/plan.py counts steps; rows count full, pads included."""
    if max_steps is not None:
        return Work((max_steps, max_steps), global_batch, length, f"training.maxSteps {max_steps}")
    if rows is None:
        return Work(None, global_batch, length, unknown)
    fewest, most = (max(1, math.ceil(max(1, round(number * epochs)) / global_batch)) for number in rows)
    said = number_of(rows[1], "row") if rows[0] == rows[1] else f"{rows[0]:,} to {number_of(rows[1], 'row')}"
    return Work((fewest, most), global_batch, length, f"{said}, {number_of(epochs, 'epoch')}")


class Estimate(NamedTuple):
    """Seconds, hours and dollars as (low, high). Hours are of the whole job, node-hours those times the nodes."""

    flops: Flops
    peak: float
    tokens_per_second: Range
    step_seconds: Range
    million_token_hours: Range
    training_hours: Range | None
    compile_hours: Range
    trainium_node_hours: Range | None
    cpu_node_hours: dict[str, Range]
    price: Price | None
    dollars: Range | None
    fixed_dollars: Range | None
    million_token_dollars: Range | None


def estimate(
    architecture: Architecture,
    step: Step,
    instance: Instance,
    *,
    nodes: int,
    todo: Work,
    price: Price | None,
    compile_on_cpu: bool,
    cpu_stages: dict[str, Range],
) -> Estimate:
    """``cpu_stages`` are node-hours of the stages that run on CPU nodes (see ``cpu_node_hours``)."""
    flops = flops_per_token(architecture, step)
    peak = instance.flops * instance.cores * nodes
    low, high = UTILIZATION
    speed = (peak * low / flops.total, peak * high / flops.total)
    tokens_per_step = todo.global_batch * todo.length
    million = (1e6 / speed[1] / 3600, 1e6 / speed[0] / 3600)
    training = None
    if todo.tokens is not None:
        training = (
            todo.tokens[0] / speed[1] / 3600 + START_HOURS[0],
            todo.tokens[1] / speed[0] / 3600 + START_HOURS[1],
        )
    compiling = COLLECT_HOURS if compile_on_cpu else COMPILE_HOURS
    node_hours = times(plus(training, compiling), nodes) if training else None
    rate = price.dollars if price else None
    return Estimate(
        flops=flops,
        peak=peak,
        tokens_per_second=speed,
        step_seconds=(tokens_per_step / speed[1], tokens_per_step / speed[0]),
        million_token_hours=million,
        training_hours=training,
        compile_hours=compiling,
        trainium_node_hours=node_hours,
        cpu_node_hours=cpu_stages,
        price=price,
        dollars=times(node_hours, rate) if node_hours and rate is not None else None,
        fixed_dollars=times(plus(compiling, START_HOURS), nodes * rate) if rate is not None else None,
        million_token_dollars=times(million, nodes * rate) if rate is not None else None,
    )


def cpu_node_hours(
    architecture: Architecture,
    *,
    probe_tokens: int,
    eval_tokens: Range,
    generated_tokens: int,
    compile_on_cpu: bool,
) -> dict[str, Range]:
    """Node-hours of the stages on CPU nodes, of 16 vCPU. ``eval_tokens`` of (0, 0): evaluate is left out.

    A forward pass is 2 P operations a token; generating one token reads every weight once, which memory limits.
    """
    weights = 2.0 * architecture.parameters
    moved = (weights / DOWNLOAD[1] / 3600, weights / DOWNLOAD[0] / 3600)

    def forward(fewest: float, most: float) -> Range:
        work = 2.0 * architecture.matrix_parameters / 3600
        return work * fewest / CPU_FLOPS[1], work * most / CPU_FLOPS[0]

    stages = {
        "tokenize": plus(moved, (0.05, 0.5)),
        "consolidate": plus(forward(probe_tokens, probe_tokens), plus(moved, (0.02, 0.05))),
        "merge": plus(forward(probe_tokens, probe_tokens), plus(times(moved, 2), (0.02, 0.05))),
    }
    if compile_on_cpu:
        stages["neff"] = (0.5, 1.5)
    if eval_tokens[1]:
        answers = generated_tokens * weights / 100e9 / 3600, generated_tokens * weights / 10e9 / 3600
        stages["evaluate"] = times(plus(forward(*eval_tokens), plus(answers, moved)), 2)  # base and merged
    return stages


def plus(one: Range, other: Range) -> Range:
    return one[0] + other[0], one[1] + other[1]


def times(one: Range, factor: float) -> Range:
    return one[0] * factor, one[1] * factor


def assumptions(compile_on_cpu: bool) -> list[tuple[str, str]]:
    """(what is assumed, where it is from), in words for people."""
    low, high = UTILIZATION
    hours = COLLECT_HOURS if compile_on_cpu else COMPILE_HOURS
    return [
        (
            f"training reaches {low:.0%} to {high:.0%} of the cores' bf16 peak",
            "upper end: AWS's pre-training of Llama 3.1 8B on trn1 (Neuron docs, Trn1/Trn1n Training Performance); "
            "lower end: a guess, since nobody has published LoRA with one row a core",
        ),
        (
            f"compiling takes {hours[0]:g} to {hours[1]:g} h on each node, nothing where the graphs are in the cache",
            "optimum-neuron's guide cache_system: 30 to 60 minutes for large models"
            if not compile_on_cpu
            else "a guess: the nodes only trace the graphs",
        ),
        (f"starting and loading the model takes {START_HOURS[0]:g} to {START_HOURS[1]:g} h", "a guess"),
        (
            f"a CPU node computes {CPU_FLOPS[0] / 1e12:g} to {CPU_FLOPS[1] / 1e12:g} TFLOP/s in bf16",
            "lower end: measured on two cores, times eight (docs/neuron.md); upper end: a guess, with AMX",
        ),
        ("rows count full: pads take the time of tokens", "rows are padded to maxSequenceLength"),
    ]
