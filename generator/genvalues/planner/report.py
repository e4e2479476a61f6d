"""A plan for people, as sections of lines, and for programs, as JSON. The content is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from genvalues.common.text import number_of
from genvalues.planner.candidates import gib
from genvalues.planner.estimate import Range
from genvalues.planner.planning import Plan

MEMORY_LINES = {
    "weights": "base weights, bf16, this core's part",
    "lora": "LoRA, bf16",
    "gradients": "LoRA's gradients, fp32",
    "optimizer": "AdamW's fp32 weights and moments, this copy's share",
    "activations": "kept for the backward pass",
    "logits": "logits, bf16 and fp32",
    "working": "one layer's backward pass",
    "reserved": "reserved for runtime and graphs (an eighth)",
}


@dataclass(frozen=True)
class Section:
    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]


def sections(plan: Plan) -> list[Section]:
    """What is chosen, what was rejected, memory, time and cost, assumptions, notes: empty ones left out."""
    found = [
        Section("Run", ("", ""), run_lines(plan)),
        Section(
            "Chosen",
            ("setting", "value", "why"),
            [
                *((each.key, str(each.value), each.reason) for each in plan.choices),
                ("training.attention", plan.attention, plan.attention_reason),
            ],
        ),
        Section(
            "Not chosen",
            ("setting", "value", "why not"),
            [(each.key, str(each.value), each.rule) for each in plan.rejected],
        ),
        Section("Memory of a core", ("what", "GiB", ""), memory_lines(plan)),
        Section("Time and cost, estimated", ("what", "range", ""), cost_lines(plan)),
        Section("Assumptions", ("",), [(f"{assumed} ({source})",) for assumed, source in plan.assumptions]),
        Section("Notes", ("",), [(note.text,) for note in plan.notes]),
    ]
    return [section for section in found if section.lines]


def run_lines(plan: Plan) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("instance", f"{plan.layout.nodes} x {plan.instance}")]
    architecture = plan.model.architecture
    if architecture is None:
        return [*lines, ("model", f"{plan.model.name}: architecture not known, {plan.model.unknown}")]
    lines.append(("model", f"{plan.model.name}: {architecture.parameters:,} parameters ({plan.model.source})"))
    if plan.lora_parameters is not None:
        share = plan.lora_parameters / architecture.parameters
        lines.append(("LoRA", f"{plan.lora_parameters:,} parameters, {share:.2%} of the model's"))
    return lines


def memory_lines(plan: Plan) -> list[tuple[str, ...]]:
    needs = plan.memory
    if needs is None:
        return []
    lines: list[tuple[str, ...]] = [(name, gib(getattr(needs, name)), text) for name, text in MEMORY_LINES.items()]
    return [*lines, ("total", gib(needs.total), f"of {gib(needs.hbm)} GiB, {needs.total / needs.hbm:.0%}")]


def cost_lines(plan: Plan) -> list[tuple[str, ...]]:
    return [*work_lines(plan), *time_lines(plan), *price_lines(plan)]


def work_lines(plan: Plan) -> list[tuple[str, ...]]:
    todo = plan.work
    if todo.steps is None or todo.tokens is None:
        return [("steps", "not known", f"{todo.reason}; training.maxSteps says how many")]
    rows = f"{number_of(todo.global_batch, 'row')} of {todo.length} a step"
    return [("steps", numbers(todo.steps), todo.reason), ("tokens", numbers(todo.tokens), rows)]


def time_lines(plan: Plan) -> list[tuple[str, ...]]:
    costed, todo = plan.estimate, plan.work
    if costed is None:
        return []
    flops = costed.flops
    lines: list[tuple[str, ...]] = [
        (
            "operations a token",
            f"{flops.total / 1e9:.1f} GFLOP",
            f"forward {flops.forward / 1e9:.1f}, backward {flops.backward / 1e9:.1f}, again {flops.again / 1e9:.1f}, "
            f"LoRA {flops.lora / 1e9:.2f}",
        ),
        (
            "tokens a second",
            numbers(costed.tokens_per_second),
            f"of {costed.peak / 1e12:,.0f} TFLOP/s at best",
        ),
        ("seconds a step", figures(costed.step_seconds), f"{todo.global_batch * todo.length:,} tokens"),
        ("hours a million tokens", figures(costed.million_token_hours), "of training alone"),
        ("compile, hours", figures(costed.compile_hours), "on every Trainium node; less from the cache"),
    ]
    if costed.training_hours:
        lines.append(("train, hours", figures(costed.training_hours), "on every Trainium node"))
    if costed.trainium_node_hours:
        lines.append(("Trainium node-hours", figures(costed.trainium_node_hours), "compile and train"))
    stages = costed.cpu_node_hours
    everything = (sum(each[0] for each in stages.values()), sum(each[1] for each in stages.values()))
    lines.append(
        (
            "CPU node-hours",
            figures(everything),
            "Trainium is free meanwhile: " + ", ".join(f"{name} {figures(each)}" for name, each in stages.items()),
        )
    )
    return lines


def price_lines(plan: Plan) -> list[tuple[str, ...]]:
    """Of a node-hour; and of the run, where its hours are estimated."""
    price, costed = plan.price, plan.estimate
    lines: list[tuple[str, ...]] = []
    if price is None:
        lines.append(("dollars", "not known", plan.price_unknown))
        if plan.dollars_on_ec2 and plan.price_on_ec2:
            why = f"in {plan.price_on_ec2.region}; HyperPod's price is another and not known here"
            lines.append(("dollars, at EC2's price", figures(plan.dollars_on_ec2, "$"), why))
        return lines
    where = ", ".join(part for part in (price.kind, price.region, price.dated) if part)
    lines.append(("a node-hour", f"${price.dollars:g}", where))
    if costed is None:
        return lines
    if costed.dollars:
        lines.append(("dollars", figures(costed.dollars, "$"), "Trainium nodes; CPU nodes and storage come on top"))
    elif costed.million_token_dollars and costed.fixed_dollars:
        lines.append(("dollars a million tokens", figures(costed.million_token_dollars, "$"), "of training"))
        lines.append(("dollars beside", figures(costed.fixed_dollars, "$"), "to compile and to start"))
    return lines


def figures(both: Range, sign: str = "") -> str:
    """0.12 to 1.5, with as many digits as a range of this kind deserves."""
    low, high = (_figure(each) for each in both)
    return f"{sign}{low}" if low == high else f"{sign}{low} to {sign}{high}"


def _figure(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2g}"


def numbers(both: tuple[float, float]) -> str:
    low, high = (f"{each:,.0f}" for each in both)
    return low if low == high else f"{low} to {high}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The keys are in docs/plan.md. Bytes, seconds, hours and dollars are numbers, ranges are [low, high]."""
    layout, model, costed = plan.layout, plan.model, plan.estimate
    architecture = model.architecture
    return {
        "instance": plan.instance,
        "model": {
            "name": model.name,
            "source": model.source or None,
            "unknown": model.unknown or None,
            "parameters": architecture.parameters if architecture else None,
            "loraParameters": plan.lora_parameters,
            "architecture": camel(asdict(architecture)) if architecture else None,
        },
        "layout": {
            "nodes": layout.nodes,
            "processesPerNode": layout.processes_per_node,
            "tensorParallelSize": layout.tensor_parallel,
            "dataParallelSize": layout.data_parallel,
            "perDeviceBatchSize": layout.per_device,
            "gradientAccumulationSteps": layout.accumulation,
            "globalBatchSize": layout.global_batch,
            "activationCheckpointing": layout.checkpointing,
            "attention": plan.attention,
        },
        "choices": [
            *(
                {"key": each.key, "value": each.value, "reason": each.reason, "wished": each.wished}
                for each in plan.choices
            ),
            {
                "key": "training.attention",
                "value": plan.attention,
                "reason": plan.attention_reason,
                "wished": plan.attention_reason == "as written",
            },
        ],
        "rejected": [
            {"key": each.key, "value": each.value, "reason": each.rule, "possible": each.possible}
            for each in plan.rejected
        ],
        "memory": {**camel(plan.memory._asdict()), "total": plan.memory.total} if plan.memory else None,
        "work": {
            "steps": list(plan.work.steps) if plan.work.steps else None,
            "tokens": list(plan.work.tokens) if plan.work.tokens else None,
            "globalBatchSize": plan.work.global_batch,
            "reason": plan.work.reason,
        },
        "estimate": {
            "flopsPerToken": {**costed.flops._asdict(), "total": costed.flops.total},
            "peakFlops": costed.peak,
            "tokensPerSecond": ranged(costed.tokens_per_second),
            "stepSeconds": ranged(costed.step_seconds),
            "hoursPerMillionTokens": ranged(costed.million_token_hours),
            "compileHours": ranged(costed.compile_hours),
            "trainHours": ranged(costed.training_hours),
            "trainiumNodeHours": ranged(costed.trainium_node_hours),
            "cpuNodeHours": {name: ranged(hours) for name, hours in costed.cpu_node_hours.items()},
            "dollars": ranged(costed.dollars),
            "dollarsAtEc2Price": ranged(plan.dollars_on_ec2),
            "dollarsPerMillionTokens": ranged(costed.million_token_dollars),
            "dollarsToCompileAndStart": ranged(costed.fixed_dollars),
        }
        if costed
        else None,
        "price": camel(plan.price._asdict()) if plan.price else None,
        "priceUnknown": plan.price_unknown or None,
        "priceOnEc2": camel(plan.price_on_ec2._asdict()) if plan.price_on_ec2 else None,
        "assumptions": [{"assumed": assumed, "from": source} for assumed, source in plan.assumptions],
        "notes": [note.text for note in plan.notes],
    }


def ranged(both: tuple[float, float] | None) -> list[float] | None:
    return [float(f"{each:.6g}") for each in both] if both else None


def camel(values: dict[str, Any]) -> dict[str, Any]:
    def spelled(name: str) -> str:
        first, *rest = name.split("_")
        return first + "".join(part.title() for part in rest)

    return {spelled(name): value for name, value in values.items()}


def as_text(plan: Plan, width: int = 120) -> str:
    """For a file, a pipe or a log: no boxes, no colour, columns by spaces, long last columns wrapped."""
    import textwrap

    blocks = []
    for section in sections(plan):
        widths = [
            max(len(line[index]) for line in [section.columns, *section.lines]) for index in range(len(section.columns))
        ]
        left = sum(each + 2 for each in widths[:-1])
        lines = [section.title]
        for cells in section.lines:
            wrapped = textwrap.wrap(cells[-1], max(30, width - left - 2)) or [""]
            start = "".join(cell.ljust(each + 2) for cell, each in zip(cells[:-1], widths[:-1], strict=True))
            lines.append(f"  {start}{wrapped[0]}".rstrip())
            lines += [" " * (left + 2) + part for part in wrapped[1:]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def print_rich(plan: Plan) -> None:
    """On a terminal: a table for each section."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for section in sections(plan):
        table = Table(
            title=section.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_header=any(section.columns),
            expand=False,
        )
        for index, name in enumerate(section.columns):
            right = name in ("GiB", "range", "value")
            table.add_column(
                name, no_wrap=index == 0 and len(section.columns) > 2, justify="right" if right else "left"
            )
        for cells in section.lines:
            style = "bold" if cells[0] == "total" else None
            table.add_row(*(_escaped(cell) for cell in cells), style=style)
        console.print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
