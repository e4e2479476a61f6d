"""From checked inputs to a plan. ``plan`` is pure; ``gather_facts`` reads files and, where it must, asks the Hub."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from genvalues.accelerators.architectures import target_names
from genvalues.accelerators.instances import HYPERPOD, trainium
from genvalues.accelerators.memory import Memory
from genvalues.common.dicts import get
from genvalues.planner import dataset, models
from genvalues.planner.candidates import length_problems, too_few_rows
from genvalues.planner.choices import choose
from genvalues.planner.estimate import (
    COLLECT_HOURS,
    COMPILE_HOURS,
    START_HOURS,
    Estimate,
    Work,
    assumptions,
    cpu_node_hours,
    estimate,
    work,
)
from genvalues.planner.layout import Choice, Layout, Note, Refused, Rejection, Run, Wishes
from genvalues.planner.models import Model
from genvalues.planner.prices import Price, price_per_node_hour, region_of
from genvalues.settings.datasets import is_file, is_on_hub, row_format
from genvalues.settings.inputs import Inputs, ModelPath
from genvalues.settings.value_rules import COMPILING_STALL_TIMEOUT, DEFAULT_MOUNT, FLASH_ROWS, STALL_TIMEOUT, seconds


class Priced(NamedTuple):
    """What a node-hour costs; or why that is not known, and, for HyperPod, what it is on EC2 in the same region."""

    price: Price | None
    unknown: str = ""
    on_ec2: Price | None = None


class Facts(NamedTuple):
    """What was found about model and dataset. ``rows_unknown`` says why there are no examples.

    ``of_hub`` is what the Hub has counted: for hours and dollars alone, because what is chosen must not depend on who
    answers today.
    """

    model: Model
    examples: dataset.Examples | None = None
    rows_unknown: str = "the rows of a dataset that is not on this computer are not counted"
    of_hub: dataset.Examples | None = None


class Plan(NamedTuple):
    """What a run would be. ``memory`` and ``estimate`` are None on the CPU and where the model is not known."""

    instance: str
    model: Model
    attention: str
    attention_reason: str
    layout: Layout
    choices: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    memory: Memory | None
    work: Work
    estimate: Estimate | None
    price: Price | None
    price_unknown: str
    price_on_ec2: Price | None  # where HyperPod's own is not known
    dollars_on_ec2: tuple[float, float] | None
    lora_parameters: int | None
    notes: tuple[Note, ...] = ()
    assumptions: tuple[tuple[str, str], ...] = ()


def gather_facts(inputs: Inputs, offline: bool = False, count_rows: bool = False) -> Facts:
    """Model and dataset, as far as they can be seen from here. On the CPU their paths are absolute by now.

    ``count_rows``: the Hub is asked how many rows its dataset has, where hours and dollars follow from that.
    """
    if isinstance(inputs.model, ModelPath):
        model = models.at_path(inputs.model.path, here=inputs.on_cpu)
    else:
        hub_id, _, revision = inputs.model.partition("@")
        # On the CPU nothing is chosen by the model, so nobody waits for the Hub.
        model = models.on_hub(hub_id, revision, offline or inputs.on_cpu)
    wanted = inputs.dataset
    source = wanted.source
    if inputs.on_cpu and is_file(source):
        examples = dataset.count(Path(source))
        return Facts(model, examples, "this file's rows cannot be counted cheaply")
    if is_on_hub(source):
        asks = count_rows and not (offline or models.is_offline(os.environ) or inputs.on_cpu) and model.architecture
        counted = dataset.on_hub(source, wanted.config, wanted.split or "train") if asks else None
        return Facts(model, None, "nobody here knows how many rows this dataset of the Hub has", counted)
    return Facts(model, None, "the rows of a dataset on S3 or on the volume are not counted here")


def plan(inputs: Inputs, seen: Facts, priced: Priced | None = None) -> Plan:
    """The plan for inputs that have been checked. Raises Refused where wishes cannot be kept, or nothing fits.

    ``priced`` is what a node-hour costs, or why that is not known; ``known_price`` when left out.
    """
    instance = trainium(inputs.instance)
    uses = attention(inputs)
    training = inputs.training

    def rows_of(examples: dataset.Examples | None) -> tuple[int, int] | None:
        return examples and examples.rows(training.max_sequence_length, training.packing, inputs.dataset.eval_fraction)

    rows = rows_of(seen.examples)
    run = Run(
        instance=inputs.instance,
        length=training.max_sequence_length,
        attention=uses,
        r=inputs.lora.r,
        targets=tuple(target_names(inputs.lora.target_modules)),
        dropout=inputs.lora.dropout > 0,
        rows=rows or None,
        cpu_processes=inputs.cpu.processes if inputs.cpu else 2,
    )
    if instance and (problems := list(length_problems(run, seen.model.architecture))):
        raise Refused(*problems)
    price, price_unknown, ec2 = priced or known_price(inputs)

    def todo(layout: Layout, rows: tuple[int, int] | None = run.rows) -> Work:
        return work(rows, training.epochs, training.max_steps, layout.global_batch, run.length, seen.rows_unknown)

    def costs(layout: Layout, todo: Work) -> Estimate | None:
        architecture = seen.model.architecture
        if instance is None or architecture is None:
            return None
        evaluated = inputs.evaluation
        enabled = evaluated.enabled if evaluated.enabled is not None else inputs.dataset.eval_fraction > 0
        on_cpu = inputs.compile.runs_on == "cpu"
        probe = inputs.probe
        # Held-out examples are not packed: each is a row of its own length.
        examples = seen.examples or seen.of_hub
        shortest, longest = examples.tokens(run.length) if examples else (min(dataset.SHORTEST, run.length), run.length)
        eval_tokens = evaluated.max_rows * shortest, evaluated.max_rows * longest
        return estimate(
            architecture,
            run.step(layout.per_device, layout.checkpointing),
            instance,
            nodes=layout.nodes,
            todo=todo,
            price=price,
            compile_on_cpu=on_cpu,
            cpu_stages=cpu_node_hours(
                architecture,
                probe_tokens=probe.rows * min(probe.max_tokens, run.length),
                eval_tokens=eval_tokens if enabled else (0, 0),
                generated_tokens=evaluated.samples * evaluated.max_new_tokens,
                compile_on_cpu=on_cpu,
            ),
        )

    def hours(layout: Layout) -> tuple[float, float] | None:
        costed = costs(layout, todo(layout))
        if costed is None or costed.training_hours is None:
            return None
        return tuple(
            train + compiling for train, compiling in zip(costed.training_hours, costed.compile_hours, strict=True)
        )  # type: ignore[return-value]

    compiling = COLLECT_HOURS if inputs.compile.runs_on == "cpu" else COMPILE_HOURS
    chosen = choose(run, wishes(inputs), seen.model, hours, compiling[1] + START_HOURS[1])
    rows = run.rows or rows_of(seen.of_hub)
    to_train = todo(chosen.layout, rows)
    costed = costs(chosen.layout, to_train)
    total = None if training.max_steps is not None or not rows else max(1, round(rows[1] * training.epochs))
    processes = inputs.cpu.processes if inputs.cpu else None
    few = too_few_rows(chosen.layout, rows, total, wishes(inputs), processes)
    node_hours = costed.trainium_node_hours if costed else None
    on_ec2 = (node_hours[0] * ec2.dollars, node_hours[1] * ec2.dollars) if ec2 and node_hours else None
    most = inputs.guards.max_cost
    notes = [*chosen.notes, *([few] if few else []), *overrides(inputs)]
    if inputs.on_cpu and isinstance(inputs.model, ModelPath) and "cannot be read" in seen.model.unknown:
        mount = inputs.chart_values.get("workspace", {}).get("mountPath") or DEFAULT_MOUNT
        if PurePosixPath(mount) not in PurePosixPath(inputs.model.path).parents:  # a path there is a pod's, as a rule
            notes.append(Note(("model", "path"), f"{seen.model.unknown}: no stage here can load this model."))
    if most and costed and costed.dollars and most < costed.dollars[1]:
        text = f"{most:g} dollars may stop the run before its end: it takes up to {costed.dollars[1]:,.0f} by estimate."
        notes.append(Note(("guards", "maxCost"), text))
    limit = stall_timeout(inputs)
    if costed and 0 < seconds(str(limit.value)) < costed.step_seconds[1]:
        text = f"{limit.value} may end the training within a step: one takes up to {costed.step_seconds[1] / 60:,.0f} "
        notes.append(Note(("guards", "stallTimeout"), text + "minutes by estimate. Write more, or take smaller steps."))
    architecture = seen.model.architecture
    return Plan(
        instance=inputs.instance,
        model=seen.model,
        attention=uses,
        attention_reason=attention_reason(inputs, uses),
        layout=chosen.layout,
        choices=(*chosen.choices, *([limit] if instance else [])),
        rejected=chosen.rejected,
        memory=chosen.memory,
        work=to_train,
        estimate=costed,
        price=price,
        price_unknown=price_unknown,
        price_on_ec2=ec2,
        dollars_on_ec2=on_ec2,
        lora_parameters=architecture.lora_parameters(run.r, run.targets) if architecture else None,
        notes=tuple(notes),
        assumptions=tuple(assumptions(inputs.compile.runs_on == "cpu")) if costed else (),
    )


def wishes(inputs: Inputs) -> Wishes:
    training, parallelism = inputs.training, inputs.parallelism
    return Wishes(
        nodes=inputs.nodes,
        tensor_parallel=parallelism.tensor_parallel_size,
        max_hours=parallelism.max_hours,
        per_device=training.per_device_batch_size,
        accumulation=training.gradient_accumulation_steps,
        global_batch=training.global_batch_size,
        checkpointing=training.activation_checkpointing,
    )


def attention(inputs: Inputs) -> str:
    """As written; else flash where it is as right as eager (a row is one text) and Neuron's kernel takes the rows."""
    if inputs.training.attention is not None:
        return inputs.training.attention
    is_text = row_format(inputs.dataset.format, inputs.dataset.source) == "text"
    fits = inputs.training.max_sequence_length % FLASH_ROWS == 0
    return "flash" if is_text and fits and not inputs.on_cpu else "eager"


def attention_reason(inputs: Inputs, uses: str) -> str:
    if inputs.training.attention is not None:
        return "as written"
    format_ = row_format(inputs.dataset.format, inputs.dataset.source)
    if uses == "flash":
        return (
            f"format text: a row is one text, and {inputs.training.max_sequence_length} is a multiple of {FLASH_ROWS}"
        )
    if inputs.on_cpu:
        return "flash is a kernel of Trainium's"
    if format_ != "text":
        return f"format {format_}: examples in a row are kept apart by a mask, which flash does not take"
    return f"flash takes rows of a multiple of {FLASH_ROWS}, not of {inputs.training.max_sequence_length}"


def stall_timeout(inputs: Inputs) -> Choice:
    """guards.stallTimeout, which on Trainium must be longer than what comes before the first step."""
    key, written = "guards.stallTimeout", inputs.guards.stall_timeout
    if written is not None:
        return Choice(key, written or "never", "as written", wished=True)
    if (get(inputs.chart_values, "compile.onMismatch", str) or inputs.compile.on_mismatch) == "warn":
        reason = "with compile.onMismatch: warn the first step may wait for an hour of compiling"
        return Choice(key, COMPILING_STALL_TIMEOUT, reason)
    return Choice(key, STALL_TIMEOUT, "nothing is compiled in train; longer than reading the model takes, as a rule")


def known_price(inputs: Inputs, region: str | None = None) -> Priced:
    """The inputs' guards.pricePerNodeHour, else the table's price in ``region`` (left out: the image's)."""
    written = inputs.guards.price_per_node_hour
    if written is not None:
        return Priced(Price(written, "guards.pricePerNodeHour"))
    if inputs.on_cpu:
        return Priced(None, "a CPU node may be anything")
    region = region or region_of(inputs.image)
    if found := price_per_node_hour(inputs.instance, region):
        return Priced(found)
    told = f"no price known for {inputs.instance}" + (f" in {region}" if region else "")
    told += ": give guards.pricePerNodeHour, or ask with --live"
    # EC2's price for a HyperPod instance: to show, never for guards.pricePerNodeHour.
    plain = inputs.instance.removeprefix(HYPERPOD)
    ec2 = price_per_node_hour(plain, region) if plain != inputs.instance else None
    if ec2:
        told += f" (on EC2, where HyperPod's price is not the same, {plain} is ${ec2.dollars:g} in {ec2.region})"
    return Priced(None, told, ec2)


def overrides(inputs: Inputs) -> list[Note]:
    """chartValues are merged last, over what is planned."""
    over = inputs.chart_values
    named = [
        f"chartValues.{section}"
        for section in ("parallelism", "training", "lora", "model", "devices", "compile", "guards")
        if over.get(section)
    ]
    if not named:
        return []
    text = f"{', '.join(named)} changes what is planned here: the values have it, this plan has not."
    return [Note(("chartValues",), text, warns=False)]
