"""From checked inputs to a plan. ``plan`` is pure; ``gather_facts`` reads files and may ask the Hub."""

from __future__ import annotations

import math
import os
from pathlib import PurePosixPath
from typing import NamedTuple

from genvalues.accelerators.architectures import Architecture, target_names
from genvalues.accelerators.cpu_memory import MOST_RESIDENT, SAMPLE_TOKENS, resident
from genvalues.accelerators.instances import trainium
from genvalues.accelerators.native_rules import ROWS
from genvalues.accelerators.neuron_rules import FLASH_ROWS
from genvalues.common.dicts import get
from genvalues.planner import dataset, models
from genvalues.planner.candidates import few_steps, too_few_rows
from genvalues.planner.choices import choose
from genvalues.planner.estimate import Estimate, Range, Work, assumptions, cpu_node_hours, estimate, times, work
from genvalues.planner.layout import FROM_INPUTS, Choice, Layout, Memory, Note, Rejection, Run, Wishes
from genvalues.planner.models import ModelFacts
from genvalues.planner.prices import Price, Priced, known_price
from genvalues.planner.trace import Trace
from genvalues.settings.datasets import is_on_hub, is_path, row_format
from genvalues.settings.inputs import Inputs, ModelPath
from genvalues.settings.value_rules import COMPILING_STALL_TIMEOUT, DEFAULT_MOUNT, seconds, usual_stall_timeout


class Facts(NamedTuple):
    """What is known about model and dataset. ``rows_unknown``: why there are no examples.

    ``of_hub`` is the Hub's count. It is used only for hours and dollars, because the layout must not depend on a
    service's answer.
    """

    model: ModelFacts
    examples: dataset.Examples | None = None
    rows_unknown: str = "the dataset's row count is unknown"
    of_hub: dataset.Examples | None = None


class Plan(NamedTuple):
    """What a run will be. ``memory`` and ``estimate`` are None on the CPU and for unknown architectures."""

    instance: str
    backend: str
    backend_status: str
    model: ModelFacts
    attention: str
    layout: Layout
    choices: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    memory: Memory | None
    work: Work
    estimate: Estimate | None
    price: Price | None
    price_unknown: str
    price_on_ec2: Price | None  # where HyperPod's price is unknown
    dollars_on_ec2: Range | None
    lora_parameters: int | None
    notes: tuple[Note, ...] = ()
    assumptions: tuple[tuple[str, str], ...] = ()
    trace: Trace | None = None  # of `genvalues plan --trace`


def gather_facts(inputs: Inputs, offline: bool = False, count_rows: bool = False) -> Facts:
    """Model and dataset, as far as they can be seen from here. On the CPU their paths must be absolute.

    ``count_rows``: ask the Hub for the dataset's number of rows where hours and dollars depend on it.
    """
    if isinstance(inputs.model, ModelPath):
        model = models.at_path(inputs.model.path, here=inputs.on_cpu)
    else:
        hub_id, _, revision = inputs.model.partition("@")
        # On the CPU no choice depends on the model.
        model = models.on_hub(hub_id, revision, offline or inputs.on_cpu)
    wanted = inputs.dataset
    source = wanted.source
    if inputs.on_cpu and is_path(source):
        return Facts(model, dataset.of_files(wanted), "the row count of this file is unknown")
    if is_on_hub(source):
        asks = count_rows and not (offline or models.is_offline(os.environ) or inputs.on_cpu) and model.architecture
        counted = dataset.of_hub(wanted) if asks else None
        return Facts(model, of_hub=counted)
    return Facts(model)


def plan(inputs: Inputs, facts: Facts, priced: Priced | None = None) -> Plan:
    """The plan for checked inputs. Raises Refused where they cannot be satisfied, or nothing fits.

    ``priced``: the price of a node-hour; None: ``known_price``.
    """
    price, price_unknown, ec2 = priced or known_price(inputs)
    run, wishes, architecture = run_of(inputs, facts), wishes_of(inputs), facts.model.architecture
    chosen = choose(run, wishes, facts.model)
    rows = run.rows or epoch_rows(inputs, facts.of_hub)
    todo = work(run, rows, chosen.layout.global_batch)
    costed = estimate_of(inputs, facts, run, chosen.layout, todo, price)
    node_hours = costed.trainium_node_hours if costed else None
    stall = stall_timeout(inputs)
    few = too_few_rows(run, wishes, chosen.layout, rows, bool(inputs.cpu and inputs.cpu.processes))
    notes = [
        *chosen.notes,
        few,
        few_steps(run, wishes, chosen.layout, rows),
        chart_values_note(inputs),
        unreadable_model_note(inputs, facts.model),
        cost_note(inputs, costed),
        stall_note(stall, costed),
    ]
    return Plan(
        instance=inputs.instance,
        backend=run.backend,
        backend_status=backend_status(inputs),
        model=facts.model,
        attention=run.attention,
        layout=chosen.layout,
        choices=(*chosen.choices, attention_choice(inputs), *([] if inputs.on_cpu else [stall])),
        rejected=chosen.rejected,
        memory=chosen.memory,
        work=todo,
        estimate=costed,
        price=price,
        price_unknown=price_unknown,
        price_on_ec2=ec2,
        dollars_on_ec2=times(node_hours, ec2.dollars) if ec2 and node_hours else None,
        lora_parameters=architecture.lora_parameters(run.r, run.targets) if architecture else None,
        notes=tuple(note for note in notes if note),
        assumptions=tuple(assumptions(run)) if costed else (),
    )


def run_of(inputs: Inputs, facts: Facts) -> Run:
    training = inputs.training
    return Run(
        instance=inputs.instance,
        backend=inputs.chosen_backend,
        length=training.max_sequence_length,
        attention=str(attention_choice(inputs).value),
        r=inputs.lora.r,
        targets=tuple(target_names(inputs.lora.target_modules)),
        dropout=inputs.lora.dropout > 0,
        rows=epoch_rows(inputs, facts.examples),
        rows_unknown=facts.rows_unknown,
        epochs=training.epochs,
        max_steps=training.max_steps,
        eval_steps=training.eval_steps,
        eval_rows=training.eval_rows,
        compile_on_cpu=inputs.compile.runs_on == "cpu",
        cpu_processes=inputs.cpu.processes if inputs.cpu else 2,
    )


def wishes_of(inputs: Inputs) -> Wishes:
    training, parallelism = inputs.training, inputs.parallelism
    return Wishes(
        backend=inputs.backend,
        nodes=inputs.nodes,
        tensor_parallel=parallelism.tensor_parallel_size,
        shard_size=parallelism.shard_size,
        max_hours=parallelism.max_hours,
        per_device=training.per_device_batch_size,
        accumulation=training.gradient_accumulation_steps,
        global_batch=training.global_batch_size,
        checkpointing=training.activation_checkpointing,
    )


def epoch_rows(inputs: Inputs, examples: dataset.Examples | None) -> tuple[int, int] | None:
    """Fewest and most rows of an epoch."""
    training = inputs.training
    if examples is None:
        return None
    held_out = 0.0 if inputs.dataset.holds_out_apart else inputs.dataset.eval_fraction
    return examples.rows(training.max_sequence_length, training.packing, held_out)


def estimate_of(
    inputs: Inputs, facts: Facts, run: Run, layout: Layout, todo: Work, price: Price | None
) -> Estimate | None:
    """Time and cost; None on the CPU and for an unknown architecture."""
    architecture, instance = facts.model.architecture, trainium(inputs.instance)
    if architecture is None or instance is None:
        return None
    evaluation, probe = inputs.evaluation, inputs.probe
    # Held-out examples are not packed: each is one row with its own length.
    examples = facts.examples or facts.of_hub
    example_tokens = examples.tokens(run.length) if examples else (min(dataset.SHORTEST, run.length), run.length)
    stages = cpu_node_hours(
        architecture,
        probe_tokens=probe.rows * min(probe.max_tokens, run.length),
        eval_tokens=times(example_tokens, evaluation.max_rows) if inputs.evaluates else (0, 0),
        generated_tokens=generated_tokens(inputs, architecture),
        max_eval_hours=evaluation.max_hours,
        compile_on_cpu=run.compile_on_cpu,
        rehearses=inputs.rehearses,
    )
    return estimate(architecture, run, instance, layout, todo, price, stages)


def generated_tokens(inputs: Inputs, architecture: Architecture) -> int:
    """How often evaluate reads every weight to generate: once for each token of a batch of answers.

    How long the prompts are is not known here; they can make the batches smaller.
    """
    evaluation = inputs.evaluation
    if resident(architecture) > MOST_RESIDENT:
        return 0
    batches = math.ceil(evaluation.samples * evaluation.max_new_tokens / SAMPLE_TOKENS)
    return batches * evaluation.max_new_tokens


def attention_choice(inputs: Inputs) -> Choice:
    """training.attention: causal where it computes the same as isolated (one text per row) and supports the rows."""
    key, wanted, length = "training.attention", inputs.training.attention, inputs.training.max_sequence_length
    sources = inputs.dataset.additional.values()
    first = row_format(inputs.dataset.format, inputs.dataset.source)
    format_ = next((each.format for each in sources if each.format not in (None, "text")), first)
    if wanted is not None:
        return Choice(key, wanted, FROM_INPUTS, wished=True)
    if inputs.on_cpu:
        return Choice(key, "isolated", "default; causal is not faster on a CPU")
    if format_ != "text":
        reason = f"packed examples of format {format_} need a mask, which causal attention does not have"
        return Choice(key, "isolated", reason)
    unit = ROWS if inputs.chosen_backend == "native" else FLASH_ROWS
    if length % unit:
        reason = f"causal attention needs rows of a multiple of {unit} tokens, not {length}"
        return Choice(key, "isolated", reason)
    return Choice(key, "causal", f"format text has one text per row, and {length} is a multiple of {unit}")


def stall_timeout(inputs: Inputs) -> Choice:
    """guards.stallTimeout, which on Trainium must cover everything before the first step."""
    key, written = "guards.stallTimeout", inputs.guards.stall_timeout
    if written is not None:
        return Choice(key, written or "never", FROM_INPUTS, wished=True)
    if (get(inputs.chart_values, "compile.onMismatch", str) or inputs.compile.on_mismatch) == "warn":
        reason = "with compile.onMismatch: warn the first step may compile for an hour"
        return Choice(key, COMPILING_STALL_TIMEOUT, reason)
    reason = "longer than loading the model usually takes"
    if inputs.chosen_backend == "native":
        reason = "longer than loading the model and compiling some graphs again usually take"
    model_id = inputs.model.partition("@")[0] if isinstance(inputs.model, str) else None
    return Choice(key, usual_stall_timeout(inputs.chosen_backend, model_id), f"default; {reason}")


# --- notes


def backend_status(inputs: Inputs) -> str:
    """What is known about the backend on Trainium; empty on the CPU."""
    if inputs.on_cpu:
        return ""
    if inputs.chosen_backend == "xla":
        return (
            "AWS ended PyTorch/XLA training on Neuron with SDK 2.30 (May 2026); Trn1 stays on the last images for it. "
            "The way on is Trn2 with backend native."
        )
    return (
        "proven on CPUs, not yet run on Trainium. Memory is computed; `genvalues plan --trace` compares it with a "
        "trace of the engine. Hours and dollars are guesses."
    )


def chart_values_note(inputs: Inputs) -> Note | None:
    """chartValues are merged last, over what is planned."""
    names = ("parallelism", "training", "lora", "model", "devices", "compile", "guards")
    set_here = [f"chartValues.{name}" for name in names if inputs.chart_values.get(name)]
    if not set_here:
        return None
    text = f"This plan does not include {', '.join(set_here)}, which override its values."
    return Note(("chartValues",), text, warns=False)


def unreadable_model_note(inputs: Inputs, model: ModelFacts) -> Note | None:
    if not (inputs.on_cpu and isinstance(inputs.model, ModelPath) and "cannot read" in model.unknown):
        return None
    mount = get(inputs.chart_values, "workspace.mountPath", str) or DEFAULT_MOUNT
    if PurePosixPath(mount) in PurePosixPath(inputs.model.path).parents:  # probably a path in a pod
        return None
    return Note(("model", "path"), f"{model.unknown}; the stages cannot load this model.")


def cost_note(inputs: Inputs, costed: Estimate | None) -> Note | None:
    most = inputs.guards.max_cost
    if not (most and costed and costed.dollars and most < costed.dollars[1]):
        return None
    text = f"${most:g} may stop the run before it finishes: the estimate is up to ${costed.dollars[1]:,.0f}."
    return Note(("guards", "maxCost"), text)


def stall_note(limit: Choice, costed: Estimate | None) -> Note | None:
    if not (costed and 0 < seconds(str(limit.value)) < costed.step_seconds[1]):
        return None
    text = (
        f"{limit.value} may end the training within a step, which takes up to {costed.step_seconds[1] / 60:,.0f} "
        "minutes (estimate). Set a longer time or a smaller batch."
    )
    return Note(("guards", "stallTimeout"), text)
