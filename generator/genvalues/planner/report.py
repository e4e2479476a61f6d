"""A plan as text for people (sections of lines) and as JSON for programs, with the same content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from genvalues.accelerators.native_memory import NativeMemory
from genvalues.common.text import camel_case, number_of
from genvalues.planner.candidates import gib
from genvalues.planner.estimate import UTILIZATION, Range, plus
from genvalues.planner.layout import Memory
from genvalues.planner.planning import Plan
from genvalues.planner.trace import compare

MEMORY_LINES = {
    "weights": "base weights, bf16, this core's part",
    "lora": "LoRA weights, bf16",
    "gradients": "LoRA gradients, fp32",
    "optimizer": "AdamW weights and moments, fp32, this copy's shard",
    "activations": "kept for the backward pass",
    "logits": "logits, bf16 and fp32",
    "working": "backward pass of one layer",
    "reserved": "runtime and compiled graphs (one eighth)",
}
NATIVE_MEMORY_LINES = {
    "base": "base weights, bf16, this core's shard",
    "adapter": "LoRA weights, fp32, this core's shard",
    "gradients": "LoRA gradients, fp32",
    "optimizer": "AdamW moments, fp32, this core's shard",
    "gathered": "weights of all shards: embedding, output layer and two decoder layers",
    "activations": "kept for the backward pass",
    "loss": "logits of 256 tokens and their gradients, fp32",
    "working": "backward pass of one layer",
    "reserved": "runtime and compiled graphs (one eighth)",
}
NUMERIC_COLUMNS = ("value", "GiB", "computed GiB", "traced GiB", "estimate")


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def tables(plan: Plan) -> list[Table]:
    """Run, settings, alternatives, memory, time and cost, assumptions, notes; without empty ones."""
    assumed = [(f"{text[0].upper()}{text[1:]} ({source}).",) for text, source in plan.assumptions]
    found = [
        Table("Run", ("", ""), run_lines(plan)),
        Table(
            "Settings",
            ("setting", "value", "reason"),
            [(each.key, str(each.value), each.reason) for each in plan.choices],
        ),
        Table(
            "Alternatives not chosen",
            ("setting", "value", "reason"),
            [(each.key, str(each.value), each.reason) for each in plan.rejected],
        ),
        Table("Memory per core", ("part", "GiB", ""), memory_lines(plan)),
        Table("Memory per core, computed and traced", ("part", "computed GiB", "traced GiB", ""), traced_lines(plan)),
        Table("Trace of the engine", ("", ""), trace_lines(plan)),
        Table(
            "Time and cost (estimates)",
            ("", "estimate", ""),
            [*work_lines(plan), *time_lines(plan), *price_lines(plan)],
        ),
        Table("Assumptions", ("",), assumed),
        Table("Notes", ("",), [(note.text,) for note in plan.notes]),
    ]
    return [table for table in found if table.lines]


def run_lines(plan: Plan) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("instance", f"{plan.layout.nodes} x {plan.instance}")]
    if plan.backend_status:
        lines.append(("backend", f"{plan.backend}: {plan.backend_status}"))
    architecture = plan.model.architecture
    if architecture is None:
        return [*lines, ("model", f"{plan.model.name}, architecture unknown: {plan.model.unknown}")]
    lines.append(("model", f"{plan.model.name}, {architecture.parameters:,} parameters ({plan.model.source})"))
    if plan.lora_parameters is not None:
        share = plan.lora_parameters / architecture.parameters
        lines.append(("LoRA", f"{plan.lora_parameters:,} trainable parameters ({share:.2%} of the model's)"))
    return lines


def memory_lines(plan: Plan) -> list[tuple[str, ...]]:
    needs = plan.memory
    if needs is None:
        return []
    parts = NATIVE_MEMORY_LINES if isinstance(needs, NativeMemory) else MEMORY_LINES
    lines: list[tuple[str, ...]] = [(name, gib(getattr(needs, name)), text) for name, text in parts.items()]
    if isinstance(needs, NativeMemory):
        lines.append(("peak", gib(needs.peak), "the most at a time: loss and backward pass of a layer do not coincide"))
    return [*lines, ("total", gib(needs.total), f"{needs.total / needs.hbm:.0%} of {gib(needs.hbm)} GiB")]


def traced_lines(plan: Plan) -> list[tuple[str, ...]]:
    """Computed bytes beside those of `--trace`."""
    if plan.trace is None or not isinstance(plan.memory, NativeMemory):
        return []
    return [
        (each.part, gib(each.computed), gib(each.traced), "" if each.difference is None else f"{each.difference:+.1%}")
        for each in compare(plan.memory, plan.trace)
    ]


def trace_lines(plan: Plan) -> list[tuple[str, ...]]:
    found = plan.trace
    if found is None:
        return []
    lines: list[tuple[str, ...]] = [
        ("workers", f"one of {found.world}, traced in {found.seconds:.0f} s"),
        ("graphs", f"{found.graphs} to compile"),
        ("operators", f"{len(found.operators)}: {', '.join(found.operators)}"),
    ]
    return [*lines, *(("problem", problem) for problem in found.problems)]


def work_lines(plan: Plan) -> list[tuple[str, ...]]:
    todo = plan.work
    if todo.steps is None or todo.tokens is None:
        return [("steps", "unknown", f"{todo.reason}; set training.maxSteps for an estimate")]
    rows = f"{number_of(todo.global_batch, 'row')} of {todo.length} tokens per step, including padding"
    return [("steps", numbers(todo.steps), todo.reason), ("tokens", numbers(todo.tokens), rows)]


def time_lines(plan: Plan) -> list[tuple[str, ...]]:
    costed, todo = plan.estimate, plan.work
    if costed is None:
        return []
    flops, stages = costed.flops, costed.cpu_node_hours
    low, high = UTILIZATION[plan.backend]
    lines: list[tuple[str, ...]] = [
        (
            "GFLOPs per token",
            f"{flops.total / 1e9:.1f}",
            f"forward {flops.forward / 1e9:.1f}, backward {flops.backward / 1e9:.1f}, recomputation "
            f"{flops.again / 1e9:.1f}, LoRA {flops.lora / 1e9:.2f}",
        ),
        (
            "tokens per second",
            numbers(costed.tokens_per_second),
            f"{low:.0%} to {high:.0%} of the peak, {costed.peak / 1e12:,.0f} TFLOP/s",
        ),
        ("seconds per step", figures(costed.step_seconds), f"{todo.global_batch * todo.length:,} tokens"),
        ("hours per million tokens", figures(costed.million_token_hours), "training only"),
        ("hours to compile", figures(costed.compile_hours), "on each Trainium node; less with cached graphs"),
    ]
    if costed.training_hours:
        lines.append(("hours to train", figures(costed.training_hours), "on each Trainium node, including the start"))
    if costed.trainium_node_hours:
        lines.append(("Trainium node-hours", figures(costed.trainium_node_hours), "compile and train"))
    by_stage = ", ".join(f"{name} {figures(each)}" for name, each in stages.items())
    lines.append(("CPU node-hours", figures(plus(*stages.values())), f"without Trainium nodes: {by_stage}"))
    return lines


def price_lines(plan: Plan) -> list[tuple[str, ...]]:
    """The price of a node-hour and, where hours are estimated, the cost of the run."""
    price, costed = plan.price, plan.estimate
    if price is None:
        lines: list[tuple[str, ...]] = [("cost", "unknown", plan.price_unknown)]
        if plan.dollars_on_ec2 and plan.price_on_ec2:
            why = f"price of EC2 in {plan.price_on_ec2.region}; HyperPod's differs"
            lines.append(("cost on EC2", figures(plan.dollars_on_ec2, "$"), why))
        return lines
    source = ", ".join(part for part in (price.kind, price.region, price.dated) if part)
    lines = [("price per node-hour", f"${price.dollars:,.2f}", source)]
    if costed and costed.dollars:
        lines.append(("cost", figures(costed.dollars, "$"), "Trainium nodes; CPU nodes and storage are extra"))
    elif costed and costed.million_token_dollars and costed.fixed_dollars:
        lines.append(("cost per million tokens", figures(costed.million_token_dollars, "$"), "training only"))
        lines.append(("fixed cost", figures(costed.fixed_dollars, "$"), "to compile and start"))
    return lines


def figures(both: Range, sign: str = "") -> str:
    """``0.12 to 1.5``: two significant digits, more above 10."""
    low, high = (_figure(each) for each in both)
    return f"{sign}{low}" if low == high else f"{sign}{low} to {sign}{high}"


def _figure(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2g}"


def numbers(both: tuple[float, float]) -> str:
    """``7,079 to 19,468``"""
    low, high = (f"{each:,.0f}" for each in both)
    return low if low == high else f"{low} to {high}"


def as_json(plan: Plan) -> dict[str, Any]:
    """docs/plan.md documents the keys. Bytes, seconds, hours and dollars are numbers; ranges are [low, high]."""
    layout, model, costed = plan.layout, plan.model, plan.estimate
    architecture = model.architecture
    return {
        "instance": plan.instance,
        "backend": plan.backend,
        "backendStatus": plan.backend_status or None,
        "model": {
            "name": model.name,
            "source": model.source or None,
            "unknown": model.unknown or None,
            "parameters": architecture.parameters if architecture else None,
            "loraParameters": plan.lora_parameters,
            "architecture": camel_keys(asdict(architecture)) if architecture else None,
        },
        "layout": {
            "nodes": layout.nodes,
            "processesPerNode": layout.processes_per_node,
            "tensorParallelSize": layout.tensor_parallel,
            "dataParallelSize": layout.data_parallel,
            "shardSize": layout.shard_size,
            "perDeviceBatchSize": layout.per_device,
            "gradientAccumulationSteps": layout.accumulation,
            "globalBatchSize": layout.global_batch,
            "activationCheckpointing": layout.checkpointing,
            "attention": plan.attention,
        },
        "choices": [each._asdict() for each in plan.choices],
        "rejected": [each._asdict() for each in plan.rejected],
        "memory": memory_as_json(plan.memory) if plan.memory else None,
        "trace": plan.trace._asdict() if plan.trace else None,
        "work": {
            "steps": list(plan.work.steps) if plan.work.steps else None,
            "tokens": list(plan.work.tokens) if plan.work.tokens else None,
            "globalBatchSize": plan.work.global_batch,
            "reason": plan.work.reason,
        },
        "estimate": {
            "flopsPerToken": {**costed.flops._asdict(), "total": costed.flops.total},
            "peakFlops": costed.peak,
            "tokensPerSecond": rounded(costed.tokens_per_second),
            "stepSeconds": rounded(costed.step_seconds),
            "hoursPerMillionTokens": rounded(costed.million_token_hours),
            "compileHours": rounded(costed.compile_hours),
            "trainHours": rounded(costed.training_hours),
            "trainiumNodeHours": rounded(costed.trainium_node_hours),
            "cpuNodeHours": {name: rounded(hours) for name, hours in costed.cpu_node_hours.items()},
            "dollars": rounded(costed.dollars),
            "dollarsAtEc2Price": rounded(plan.dollars_on_ec2),
            "dollarsPerMillionTokens": rounded(costed.million_token_dollars),
            "dollarsToCompileAndStart": rounded(costed.fixed_dollars),
        }
        if costed
        else None,
        "price": plan.price._asdict() if plan.price else None,
        "priceUnknown": plan.price_unknown or None,
        "priceOnEc2": plan.price_on_ec2._asdict() if plan.price_on_ec2 else None,
        "assumptions": [{"assumed": assumed, "from": source} for assumed, source in plan.assumptions],
        "notes": [note.text for note in plan.notes],
    }


def memory_as_json(memory: Memory) -> dict[str, int]:
    if isinstance(memory, NativeMemory):
        names = [*NATIVE_MEMORY_LINES, "peak", "total", "hbm"]
        return {name: getattr(memory, name) for name in names}
    return {**camel_keys(memory._asdict()), "total": memory.total}


def rounded(both: Range | None) -> list[float] | None:
    """A range with six significant digits."""
    return [float(f"{each:.6g}") for each in both] if both else None


def camel_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {camel_case(name): value for name, value in values.items()}


def as_text(plan: Plan, width: int = 120) -> str:
    """For a file, a pipe or a log: columns separated by spaces, long last columns wrapped, no colour."""
    import textwrap

    blocks = []
    for table in tables(plan):
        last = len(table.columns) - 1
        widths = [max(len(line[index]) for line in [table.columns, *table.lines]) for index in range(last)]
        left = sum(each + 2 for each in widths)
        lines = [table.title]
        for cells in table.lines:
            wrapped = textwrap.wrap(cells[-1], max(30, width - left - 2)) or [""]
            start = "".join(cell.ljust(each + 2) for cell, each in zip(cells[:-1], widths, strict=True))
            lines.append(f"  {start}{wrapped[0]}".rstrip())
            lines += [" " * (left + 2) + part for part in wrapped[1:]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def print_rich(plan: Plan) -> None:
    """For a terminal: a rich table per section."""
    import rich.box
    import rich.table
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for table in tables(plan):
        shown = rich.table.Table(
            title=table.title,
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD,
            show_header=any(table.columns),
        )
        for index, name in enumerate(table.columns):
            shown.add_column(
                name,
                no_wrap=index == 0 and len(table.columns) > 2,
                justify="right" if name in NUMERIC_COLUMNS else "left",
            )
        for cells in table.lines:
            shown.add_row(*map(escape, cells), style="bold" if cells[0] == "total" else None)
        console.print(shown)
