"""FLOPs, hours and dollars of a run: ranges, and the assumptions behind them."""

from __future__ import annotations

import math
from typing import NamedTuple

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.instances import Instance
from genvalues.accelerators.memory import keeps_scores
from genvalues.common.text import number_of
from genvalues.planner.layout import Layout, Run
from genvalues.planner.prices import Price

Range = tuple[float, float]

# Share of a core's peak that training reaches. AWS measured 47.95 rows of 8192 tokens per second on 32 trn1.32xlarge
# for the pre-training of Llama 3.1 8B (Neuron docs, Trn1/Trn1n Training Performance, its newest figure): 393,000 tokens
# per second x 61 GFLOP (6 per parameter, 12 L s q for attention: PaLM, arXiv:2204.02311, appendix B) are 24.6 % of
# 32 x 16 x 190 TFLOPS, with rows four times as long and less overhead between kernels. No throughput is published for
# LoRA with eager attention and one row per core; the lower end is an assumption.
#
# TorchNeuron (native): AWS publishes no training throughput for it (SDK 2.33). The upper end is a user's report, not
# AWS's: LoRA on Qwen3 1.7B, tensor parallel 4 on one Trn2 device, compiled, 6,600 tokens per second, which is 7 to 10 %
# of 667 TFLOPS by the formula below. The lower end is an assumption.
UTILIZATION: dict[str, Range] = {"xla": (0.08, 0.246), "native": (0.02, 0.10)}
# Hours on each Trainium node. optimum-neuron's guide cache_system: 30 to 60 minutes to compile a large model's graphs
# from scratch. With cached graphs only the trial run remains. TorchNeuron compiles one decoder layer, whose graph all
# layers share: 5 to 10 minutes before the first step in the report above; the upper end is an assumption.
COMPILE_HOURS: dict[str, Range] = {"xla": (0.5, 1.0), "native": (0.1, 0.5)}
COLLECT_HOURS: Range = (0.1, 0.3)  # compile.runsOn cpu: the nodes only trace the graphs, a CPU node compiles them
REHEARSE_HOURS: Range = (0.02, 0.15)  # two processes, a model of two layers and the trace: an assumption
START_HOURS: Range = (0.1, 0.3)  # start the pod, read the model from FSx, load the graphs: an assumption
# A CPU node with 16 vCPU, in bf16 with torch. The lower end is the probe's time on two busy cores (docs/pipeline.md:
# 135M parameters, 1 TFLOP in 75 to 100 s), times eight; the upper end assumes AMX.
CPU_FLOPS: Range = (0.1e12, 1.5e12)
DOWNLOAD: Range = (100e6, 500e6)  # bytes per second, from the Hub, S3 and FSx to a pod
CPU_MEMORY: Range = (10e9, 100e9)  # bytes per second at which a CPU node reads weights


class Flops(NamedTuple):
    """Floating-point operations per token of a training step; ``again``: recomputation."""

    forward: float
    backward: float
    again: float
    lora: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again + self.lora


def flops_per_token(architecture: Architecture, run: Run, layout: Layout) -> Flops:
    """Two operations per parameter that a token is multiplied with (Kaplan et al. 2020, arXiv:2001.08361, table 1).

    forward: 2 P, and attention's two products with s tokens, 4 s q per layer (flash: the causal half). backward: the
    same for the gradients of activations, with twice attention's products; the frozen base has no weight gradients,
    which saves 2 P of the usual 4 P. LoRA's parameters have both. again: what is recomputed (attention's products when
    selective, with the attention's linear layers where backend native recomputes the whole block, all layers when full;
    Korthikanti et al. 2022, section 5).
    """
    a, step = architecture, run.step(layout.per_device, layout.checkpointing)
    linear = 2.0 * a.matrix_parameters
    products = 4.0 * a.layers * a.query * step.length * (1 if keeps_scores(step.attention) else 0.5)
    again = 0.0
    if step.checkpointing == "selective" and run.backend == "native":
        again = products + 2.0 * a.layers * a.attention_parameters
    elif step.checkpointing == "selective" and keeps_scores(step.attention):
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
    """The size of a training: (fewest, most) ``steps`` of ``global_batch`` rows, None where unknown; ``reason`` why."""

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


def work(run: Run, rows: tuple[int, int] | None, global_batch: int) -> Work:
    """Steps as the trainer counts them (llama_lora, total_steps). Padded rows count like full ones."""
    if run.max_steps is not None:
        return Work((run.max_steps, run.max_steps), global_batch, run.length, f"training.maxSteps {run.max_steps}")
    if rows is None:
        return Work(None, global_batch, run.length, run.rows_unknown)
    fewest, most = (max(1, math.ceil(max(1, round(number * run.epochs)) / global_batch)) for number in rows)
    counted = number_of(rows[1], "row") if rows[0] == rows[1] else f"{rows[0]:,} to {number_of(rows[1], 'row')}"
    return Work((fewest, most), global_batch, run.length, f"{counted}, {number_of(run.epochs, 'epoch')}")


class Estimate(NamedTuple):
    """Seconds, hours and dollars as (low, high). Hours are of the whole job; node-hours those times the nodes."""

    flops: Flops
    peak: float
    tokens_per_second: Range
    step_seconds: Range
    million_token_hours: Range
    training_hours: Range | None
    compile_hours: Range
    trainium_node_hours: Range | None
    cpu_node_hours: dict[str, Range]
    dollars: Range | None
    fixed_dollars: Range | None
    million_token_dollars: Range | None


def estimate(
    architecture: Architecture,
    run: Run,
    instance: Instance,
    layout: Layout,
    todo: Work,
    price: Price | None,
    cpu_stages: dict[str, Range],
) -> Estimate:
    """``cpu_stages``: node-hours of the stages on CPU nodes, see ``cpu_node_hours``."""
    nodes, step_tokens = layout.nodes, todo.global_batch * todo.length
    speed = tokens_per_second(architecture, run, instance, layout)
    million = hours_for(1e6, 1e6, speed)
    training, compiling = training_hours(architecture, run, layout, todo, speed), compile_hours(run)
    node_hours = times(plus(training, compiling), nodes) if training else None
    rate = price.dollars if price else None
    return Estimate(
        flops=flops_per_token(architecture, run, layout),
        peak=peak_flops(instance, nodes),
        tokens_per_second=speed,
        step_seconds=times(hours_for(step_tokens, step_tokens, speed), 3600),
        million_token_hours=million,
        training_hours=training,
        compile_hours=compiling,
        trainium_node_hours=node_hours,
        cpu_node_hours=cpu_stages,
        dollars=times(node_hours, rate) if node_hours and rate is not None else None,
        fixed_dollars=times(plus(compiling, START_HOURS), nodes * rate) if rate is not None else None,
        million_token_dollars=times(million, nodes * rate) if rate is not None else None,
    )


def hours_to_finish(architecture: Architecture, run: Run, instance: Instance, layout: Layout) -> Range | None:
    """Hours that compile and train hold Trainium nodes; None where the number of steps is unknown."""
    speed = tokens_per_second(architecture, run, instance, layout)
    training = training_hours(architecture, run, layout, work(run, run.rows, layout.global_batch), speed)
    return plus(training, compile_hours(run)) if training else None


def peak_flops(instance: Instance, nodes: int) -> float:
    """FLOP/s of all nodes at best."""
    return instance.flops * instance.cores * nodes


def tokens_per_second(architecture: Architecture, run: Run, instance: Instance, layout: Layout) -> Range:
    flops = flops_per_token(architecture, run, layout).total
    return times(UTILIZATION[run.backend], peak_flops(instance, layout.nodes) / flops)


def training_hours(architecture: Architecture, run: Run, layout: Layout, todo: Work, speed: Range) -> Range | None:
    """Hours of the train stage, with its start, at ``speed`` tokens per second. The held-out loss is a forward pass."""
    if todo.tokens is None or todo.steps is None:
        return None
    flops = flops_per_token(architecture, run, layout)
    measured = [held_out_tokens(run, layout, steps) * flops.forward / flops.total for steps in todo.steps]
    fewest, most = (trained + extra for trained, extra in zip(todo.tokens, measured, strict=True))
    return plus(hours_for(fewest, most, speed), START_HOURS)


def held_out_tokens(run: Run, layout: Layout, steps: int) -> int:
    """Tokens of all measurements of the held-out loss: before the first step, every evalSteps, and after the last."""
    if run.eval_steps is None:
        return 0
    at_once = layout.per_device * layout.data_parallel  # padded to whole batches of all copies
    return (1 + math.ceil(steps / run.eval_steps)) * math.ceil(run.eval_rows / at_once) * at_once * run.length


def compile_hours(run: Run) -> Range:
    """Hours that the compile stage holds Trainium nodes."""
    return COLLECT_HOURS if run.compile_on_cpu else COMPILE_HOURS[run.backend]


def hours_for(fewest: float, most: float, per_second: Range) -> Range:
    """Hours for an amount at a speed: the fewest at full speed to the most at the lowest."""
    return fewest / per_second[1] / 3600, most / per_second[0] / 3600


def cpu_node_hours(
    architecture: Architecture,
    *,
    probe_tokens: int,
    eval_tokens: Range,
    generated_tokens: int,
    max_eval_hours: float,
    compile_on_cpu: bool,
    rehearses: bool,
) -> dict[str, Range]:
    """Node-hours of the stages on CPU nodes with 16 vCPU. ``eval_tokens`` (0, 0): no evaluation.

    A forward pass takes 2 P operations per token. Generating a token reads every weight once, limited by memory;
    ``generated_tokens`` counts those of a batch once. ``max_eval_hours``: evaluation.maxHours, 0 for no limit.
    """
    operations, weights = 2.0 * architecture.matrix_parameters, 2.0 * architecture.parameters
    moved = hours_for(weights, weights, DOWNLOAD)
    probe = hours_for(operations * probe_tokens, operations * probe_tokens, CPU_FLOPS)
    stages = {
        "tokenize": plus(moved, (0.05, 0.5)),
        "consolidate": plus(probe, moved, (0.02, 0.05)),
        "merge": plus(probe, times(moved, 2), (0.02, 0.05)),
    }
    if rehearses:
        stages["rehearse"] = REHEARSE_HOURS
    if compile_on_cpu:
        stages["neff"] = (0.5, 1.5)
    if eval_tokens[1]:
        losses = hours_for(operations * eval_tokens[0], operations * eval_tokens[1], CPU_FLOPS)
        answers = hours_for(generated_tokens * weights, generated_tokens * weights, CPU_MEMORY)
        low, high = times(plus(losses, answers, moved), 2)  # base and merged
        most = max_eval_hours or math.inf
        stages["evaluate"] = min(low, most), min(high, most)
    return stages


def plus(*ranges: Range) -> Range:
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def times(one: Range, factor: float) -> Range:
    return one[0] * factor, one[1] * factor


def assumptions(run: Run) -> list[tuple[str, str]]:
    """(assumption, source), for people."""
    low, high = UTILIZATION[run.backend]
    hours = compile_hours(run)
    utilization, compiling = SOURCES[run.backend]
    return [
        (f"training reaches {low:.0%} to {high:.0%} of the peak", utilization),
        (
            f"compiling takes {hours[0]:g} to {hours[1]:g} h on each node, and nothing with cached graphs",
            "assumed: the nodes only trace the graphs" if run.compile_on_cpu else compiling,
        ),
        (f"starting and loading the model take {START_HOURS[0]:g} to {START_HOURS[1]:g} h", "assumed"),
        (
            f"a CPU node reaches {CPU_FLOPS[0] / 1e12:g} to {CPU_FLOPS[1] / 1e12:g} TFLOP/s in bf16",
            "lower end: measured on two cores, times eight, docs/pipeline.md; upper end: assumed, with AMX",
        ),
        ("padding takes as long as tokens", "rows are padded to maxSequenceLength"),
    ]


SOURCES = {  # of UTILIZATION and COMPILE_HOURS
    "xla": (
        "upper end: AWS's pre-training of Llama 3.1 8B on trn1, Neuron docs, Trn1/Trn1n Training Performance; "
        "lower end: assumed, as no throughput of LoRA with one row per core is published",
        "optimum-neuron's guide cache_system: 30 to 60 minutes for large models",
    ),
    "native": (
        "a guess: no throughput of TorchNeuron is published; upper end: a user's report of LoRA on Qwen3 1.7B with one "
        "Trn2 device, 6,600 tokens per second; lower end: assumed",
        "a guess: 5 to 10 minutes in the same report, for one decoder layer whose graph all layers share; upper end: "
        "assumed",
    ),
}
