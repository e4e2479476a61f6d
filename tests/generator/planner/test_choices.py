"""What is chosen and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from genvalues.accelerators import instances
from genvalues.accelerators.architectures import known, table
from genvalues.accelerators.neuron_rules import size_problems
from genvalues.common.errors import UserError
from genvalues.common.problems import Problem
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.planner import dataset
from genvalues.planner.layout import Refused
from genvalues.planner.models import ModelFacts
from genvalues.planner.planning import Facts, Plan, gather_facts, plan
from genvalues.settings.inputs import inputs_from

ROOT = Path(__file__).parents[3]
LEAST = {"model": "meta-llama/Llama-3.1-8B", "dataset": {"source": "a/b"}, "instance": "trn1.32xlarge", "image": "a:1"}
EVERY_LAYER = {"targetModules": "all-linear"}


def planned(examples: dataset.Examples | None = None, **written: Any) -> Plan:
    inputs = inputs_from({**LEAST, **written})
    seen = gather_facts(inputs, offline=True)
    return plan(inputs, Facts(seen.model, examples, seen.rows_unknown))


def refused(**written: Any) -> str:
    with pytest.raises(Refused) as told:
        planned(**written)
    return "\n".join(f"{key_of(each)}: {each.what}. {each.fix}" for each in told.value.problems)


def key_of(problem: Problem) -> str:
    return ".".join(map(str, problem.keys[0]))


def rejected(made: Plan, key: str, value: Any) -> str:
    [found] = [each.reason for each in made.rejected if (each.key, each.value) == (key, value)]
    return found


TP = "parallelism.tensorParallelSize"


# --- the committed environments


@pytest.mark.parametrize("environment", ["trn1", "trn1-2node", "trn1n", "trn2", "cpu"])
def test_the_plan_is_what_write_writes(environment: str) -> None:
    found = checked(Sources((ROOT / f"values/{environment}.yaml",)))
    layout, values = found.plan.layout, found.values
    committed = yaml.safe_load((ROOT / f"values/{environment}.values.yaml").read_text())
    assert committed["parallelism"] == {
        "nodes": layout.nodes,
        "processesPerNode": layout.processes_per_node,
        "tensorParallelSize": layout.tensor_parallel,
        "dataParallelSize": layout.data_parallel,
        "shardSize": layout.shard_size,
    }
    for name, chosen in (
        ("perDeviceBatchSize", layout.per_device),
        ("gradientAccumulationSteps", layout.accumulation),
        ("activationCheckpointing", layout.checkpointing),
        ("attention", found.plan.attention),
    ):
        assert committed["training"][name] == values["training"][name] == chosen
    assert "globalBatchSize" not in values["training"], "the chart has no such key"


@pytest.mark.parametrize(
    ("instance", "nodes", "tensor", "copies", "batch"),
    [("ml.trn1.32xlarge", 1, 8, 4, 12), ("trn1n.32xlarge", 2, 8, 8, 24), ("ml.trn2.48xlarge", 1, 4, 16, 48)],
)
def test_llama_8b_keeps_its_layout(instance: str, nodes: int, tensor: int, copies: int, batch: int) -> None:
    layout = planned(instance=instance, backend="xla", nodes=nodes).layout
    assert (layout.tensor_parallel, layout.data_parallel, layout.global_batch) == (tensor, copies, batch)
    assert (layout.per_device, layout.accumulation, layout.checkpointing) == (1, 3, "selective")


# --- tensor parallelism


MODELS_OF_TABLE = [row["models"][0] for row in table().values()]


@pytest.mark.parametrize("instance", [name for name in instances.TRAINIUM if instances.refusal(name, 1) is None])
@pytest.mark.parametrize("model", MODELS_OF_TABLE)
def test_every_chosen_layout_of_xla_satisfies_the_rules(model: str, instance: str) -> None:
    architecture = known(model)
    assert architecture is not None
    try:
        made = planned(
            model=model, instance=instance, backend="xla", lora=EVERY_LAYER, training={"maxSequenceLength": 1024}
        )
    except Refused as told:
        assert all(problem.fix for problem in told.problems)
        return
    layout, found = made.layout, instances.TRAINIUM[instance]
    assert list(size_problems(architecture, layout.tensor_parallel, found.generation.target)) == []
    assert 1024 % layout.tensor_parallel == 0
    assert layout.tensor_parallel in found.groups
    assert layout.tensor_parallel * layout.data_parallel == layout.nodes * layout.processes_per_node
    assert made.memory is not None
    assert made.memory.fits
    values = {each.value for each in made.rejected if each.key == TP}
    assert values | {layout.tensor_parallel} >= set(found.groups)


def test_sizes_that_are_not_chosen_have_the_rule_they_violate() -> None:
    on_trn1, on_trn2 = planned(), planned(instance="trn2.48xlarge", backend="xla")
    assert "process groups of 1, 2, 8, 16 or 32, not of 4" in rejected(on_trn1, TP, 4)
    assert "LoRA must target q, k and v together" in rejected(on_trn1, TP, 16)
    assert "needs 22" in rejected(on_trn1, TP, 1)
    assert "works (" in rejected(on_trn1, TP, 2)
    assert "more than the model's 8 key-value heads" in rejected(on_trn2, TP, 16)
    assert "32 attention heads are not divisible by 64" in rejected(on_trn2, TP, 64)
    small = planned(model="HuggingFaceTB/SmolLM2-135M")
    assert small.layout.tensor_parallel == 1
    assert "9 attention heads are not divisible by 8" in rejected(small, TP, 8)


def test_an_impossible_size_in_the_inputs_is_refused_with_those_that_work() -> None:
    told = refused(parallelism={"tensorParallelSize": 4})
    assert told.startswith(f"{TP}: ") and "not of 4" in told and told.endswith("Use 2 or 8, or remove it.")
    assert refused(parallelism={"tensorParallelSize": 1}).startswith(f"{TP}: needs 22")
    assert planned(parallelism={"tensorParallelSize": 16}, lora=EVERY_LAYER).layout.data_parallel == 2
    assert "process groups" in refused(model="some/body", parallelism={"tensorParallelSize": 3})


def test_lora_targets_that_the_only_size_that_fits_needs_are_named() -> None:
    told = refused(model="meta-llama/Llama-3.1-70B")
    assert told.startswith("lora.targetModules: with tensorParallelSize 16 the 8 key-value heads are replicated")
    assert told.endswith("Add k_proj, or use all-linear.")
    fitting = planned(model="meta-llama/Llama-3.1-70B", lora={"targetModules": ["q_proj", "k_proj", "v_proj"]})
    assert fitting.layout.tensor_parallel == 16


def test_rows_that_are_not_divisible_are_refused_with_the_nearest_lengths() -> None:
    told = refused(training={"maxSequenceLength": 2047})
    assert told.startswith("training.maxSequenceLength: ") and "2047 tokens are not divisible by" in told
    assert told.endswith("Use 2040 or 2048.")


def test_rows_longer_than_the_model_supports_are_refused() -> None:
    told = refused(model="meta-llama/Meta-Llama-3-8B", training={"maxSequenceLength": 16384})
    assert told.startswith("training.maxSequenceLength: 16384 is more than the 8192 positions of the model")
    assert told.endswith("Use 8192 or less.")


def test_heads_too_wide_for_flash_are_refused() -> None:
    architecture = known("meta-llama/Llama-3.1-8B")
    assert architecture is not None
    wide = ModelFacts("some/body", replace(architecture, head=256), "config.json")
    with pytest.raises(Refused, match="up to 128 features") as error:
        plan(inputs_from({**LEAST, "training": {"maxSequenceLength": 2048, "attention": "flash"}}), Facts(wide))
    assert [key_of(problem) for problem in error.value.problems] == ["training.attention"]


def test_an_unsupported_model_is_refused_at_its_key() -> None:
    inputs = inputs_from(LEAST)
    architecture = known("meta-llama/Llama-3.1-8B")
    assert architecture is not None
    mistral = ModelFacts("mistralai/Mistral-7B-v0.3", replace(architecture, model_type="mistral"), "config.json")
    with pytest.raises(Refused, match="mistral is not supported by optimum-neuron"):
        plan(inputs, Facts(mistral))


# --- memory


def test_8b_on_a_trn1_2xlarge_fits_only_with_whole_layers_recomputed() -> None:
    made = planned(instance="trn1.2xlarge")
    assert made.layout.checkpointing == "full"
    assert "does not fit" in rejected(made, "training.activationCheckpointing", "selective")
    told = refused(instance="trn1.2xlarge", training={"activationCheckpointing": "selective"})
    assert told.startswith("training.activationCheckpointing: meta-llama/Llama-3.1-8B needs 1")
    assert told.endswith("Use full, or remove it.")
    assert [note.key for note in made.notes] == [("instance",)]


@pytest.mark.parametrize(
    ("model", "instance", "fix"),
    [
        ("meta-llama/Llama-3.1-70B", "trn1.2xlarge", "Use trn2.48xlarge or trn2u.48xlarge, or a smaller model."),
        ("Qwen/Qwen3-14B", "trn1.2xlarge", "Use trn1.32xlarge or trn2u.48xlarge, or a smaller model."),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_instances_that_fit(model: str, instance: str, fix: str) -> None:
    told = refused(model=model, instance=instance)
    assert told.startswith(f"instance: {model} needs ")
    assert "activationCheckpointing full, but a core has 16.0 GiB" in told
    assert told.endswith(fix)


def test_rows_and_micro_batches_that_do_not_fit_are_refused_with_those_that_fit() -> None:
    told = refused(training={"perDeviceBatchSize": 64})
    assert told.startswith("training.perDeviceBatchSize: ")
    most = int(told.split("Use ")[1].split()[0])
    assert planned(training={"perDeviceBatchSize": most}).memory
    assert "perDeviceBatchSize" in refused(training={"perDeviceBatchSize": most + 1})
    long = refused(training={"maxSequenceLength": 32768})
    assert long.startswith("training.maxSequenceLength: ")
    fitting = int(long.split("Use ")[1].split(",")[0])
    assert planned(training={"maxSequenceLength": fitting}).memory


def test_a_size_in_the_inputs_is_refused_by_the_rule_it_violates_not_by_memory() -> None:
    """On trn2 16 fits but is not allowed, and 4 is allowed but its weights do not fit."""
    told = refused(
        model="meta-llama/Llama-3.1-70B",
        instance="ml.trn2.48xlarge",
        backend="xla",
        lora=EVERY_LAYER,
        parallelism={"tensorParallelSize": 16},
    ).splitlines()
    assert told[0].startswith(f"{TP}: 16 is more than the model's 8 key-value heads") and told[0].endswith("Remove it.")
    assert told[1].startswith("backend: meta-llama/Llama-3.1-70B needs 39.0 GiB")
    assert told[1].endswith("Use backend native, which can share the base weights, or remove it.")
    # Where another change makes the size work, that change is suggested instead.
    told = refused(model="meta-llama/Llama-3.1-70B", parallelism={"tensorParallelSize": 16}).splitlines()
    assert len(told) == 1 and told[0].endswith("Add k_proj, or use all-linear.")


MODELS = ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-14B", "HuggingFaceTB/SmolLM2-135M"]
LEFT_OUT = [None, None, None]
RUNS = {
    "model": MODELS,
    "instance": ["trn1.2xlarge", "trn1.32xlarge", "trn2.3xlarge", "trn2.48xlarge"],  # both backends
    "lora.targetModules": ["all-linear", ["q_proj", "v_proj"]],
    "parallelism.tensorParallelSize": [*LEFT_OUT, 1, 2, 4, 8, 16, 32, 64],
    "parallelism.shardSize": [*LEFT_OUT, *LEFT_OUT, 1, 4, 64],
    "training.maxSequenceLength": [1000, 2048, 2047, 8192, 32768, 65536, 131072],
    "training.perDeviceBatchSize": [*LEFT_OUT, 2, 16],
    "training.globalBatchSize": [*LEFT_OUT, 10, 64],
    "training.activationCheckpointing": [*LEFT_OUT, "none", "selective", "full"],
    "training.attention": ["isolated", "causal", "isolatedFlash"],
}


def nested(written: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for dotted, value in written.items():
        section, _, key = dotted.rpartition(".")
        (inputs.setdefault(section, {}) if section else inputs)[key] = value
    return inputs


@settings(derandomize=True, database=None, phases=[Phase.generate])
@given(st.fixed_dictionaries({key: st.sampled_from(values) for key, values in RUNS.items()}))
def test_following_a_fix_ends_that_mistake(written: dict[str, Any]) -> None:
    """Each "Use X" of an error makes the run work or leads to an error at another key.

    After a size that must be removed, a second error may be at the same key: it is that of the remaining sizes.
    """
    flash, length = written["training.attention"] != "isolated", written["training.maxSequenceLength"]
    assume(not flash or length % 2048 == 0)
    try:
        planned(**nested(written))
        return
    except Refused as told:
        problems = told.problems
    for problem in problems:
        if "positions of the model" in problem.what:  # the longest row; memory may allow only a shorter one
            continue
        key = key_of(problem)
        removed = dict.fromkeys(re.findall(r"\w+\.\w+", problem.fix.partition("emove ")[2]))
        if removed:
            instance = re.search(r"trn\w+\.\w+", problem.fix.partition("and remove")[0])
            try:
                planned(**nested({**written, **removed, **({"instance": instance[0]} if instance else {})}))
            except Refused as after:
                assert key_of(after.problems[0]) != key, (written, problem, after)
            continue
        suggested = problem.fix.partition("Use ")[2].partition(",")[0]
        for fitting in re.findall(r"trn\w+\.\w+|\b[0-9]+\b|none|selective|full|isolated", suggested):
            value = int(fitting) if fitting.isdigit() else fitting
            try:
                planned(**nested({**written, key: value}))
            except Refused as after:
                assert key_of(after.problems[0]) != key, (written, problem, after)
        if "Remove it" in problem.fix or "or remove it" in problem.fix:
            try:
                planned(**nested({**written, key: None}))
            except Refused as after:
                assert key_of(after.problems[0]) != key, (written, problem, after)


BATCHES = {
    "training.globalBatchSize": [None, 10, 64, 100, 128, 999],
    "training.gradientAccumulationSteps": [None, 1, 3, 7],
}


@settings(derandomize=True, database=None, phases=[Phase.generate])
@given(st.fixed_dictionaries({key: st.sampled_from(values) for key, values in {**RUNS, **BATCHES}.items()}))
def test_following_the_fixes_leads_to_a_plan(written: dict[str, Any]) -> None:
    """Or to another instance or model, whatever rules batch and micro-batches violate together."""
    assume(written["training.attention"] == "isolated" or written["training.maxSequenceLength"] % 2048 == 0)
    told: list[str] = []
    while len(told) < 6:
        try:
            planned(**nested(written))
            return
        except Refused as refusal:
            problem = refusal.problems[0]
        key = key_of(problem)
        assert f"{key}: {problem.what}" not in told, told
        told.append(f"{key}: {problem.what}")
        if key in ("instance", "model"):
            return
        if key == "lora.targetModules":
            value: Any = "all-linear"
        elif (choice := re.search(r"Use (\w+)", problem.fix)) is not None:
            value = int(choice[1]) if choice[1].isdigit() else choice[1]
        else:
            assert "emove" in problem.fix, problem
            value = None
            if "Remove gradientAccumulationSteps" in problem.fix:
                key = "training.gradientAccumulationSteps"
        written = {**written, key: value}
    pytest.fail("no end:\n" + "\n".join(told))


def test_a_micro_batch_derived_from_the_global_batch_is_refused_at_the_global_batch() -> None:
    batch = {"globalBatchSize": 128, "gradientAccumulationSteps": 1}
    for checkpointing in (None, "selective", "full"):
        told = refused(training={**batch, "activationCheckpointing": checkpointing})
        assert told.startswith("training.globalBatchSize: with 128 rows per step "), told
        fitting = told.split("Use ")[1].split(",")[0]
        assert told.endswith(f"Use {fitting}, or remove gradientAccumulationSteps.")
        for change in ({"globalBatchSize": int(fitting)}, {"gradientAccumulationSteps": None}):
            assert planned(training={**batch, "activationCheckpointing": checkpointing, **change}).memory


def test_longer_rows_recompute_whole_layers_before_they_are_refused() -> None:
    seen = [planned(training={"maxSequenceLength": length}).layout.checkpointing for length in (2048, 8192, 10240)]
    assert seen == ["selective", "selective", "full"]


# --- the batch


@pytest.mark.parametrize(
    ("written", "layout"),
    [
        ({}, (1, 3)),
        ({"globalBatchSize": 64}, (1, 16)),
        ({"globalBatchSize": 64, "perDeviceBatchSize": 2}, (2, 8)),
        ({"globalBatchSize": 24, "gradientAccumulationSteps": 3}, (2, 3)),
        ({"gradientAccumulationSteps": 5}, (1, 5)),
        ({"perDeviceBatchSize": 2}, (2, 3)),
    ],
)
def test_a_global_batch_is_divided_over_the_copies(written: dict[str, int], layout: tuple[int, int]) -> None:
    made = planned(training=written).layout
    assert (made.per_device, made.accumulation) == layout
    assert made.global_batch == written.get("globalBatchSize", layout[0] * layout[1] * 4)


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ({"globalBatchSize": 10}, "Use 8 or 12."),
        ({"globalBatchSize": 3}, "Use 4."),
        (
            {"globalBatchSize": 20, "gradientAccumulationSteps": 2},
            "Use 16 or 24, or remove gradientAccumulationSteps.",
        ),
        ({"globalBatchSize": 64, "gradientAccumulationSteps": 2, "perDeviceBatchSize": 1}, "Use 8."),
    ],
)
def test_a_global_batch_that_is_not_divisible_is_refused_with_those_that_are(written: dict[str, int], fix: str) -> None:
    told = refused(training=written)
    assert told.startswith(f"training.globalBatchSize: {written['globalBatchSize']} is not ")
    assert told.endswith(fix)


@pytest.mark.parametrize(("examples", "accumulation"), [(1000, 3), (10, 2), (5, 1), (2, 1)])
def test_a_step_has_no_more_rows_than_a_small_dataset(examples: int, accumulation: int) -> None:
    """Without packing each example is one row."""
    found = dataset.Examples(examples, 10_000)
    training = {"packing": False}
    made = planned(found, training=training, dataset={"source": "a/b", "evalFraction": 0})
    assert made.layout.accumulation == accumulation
    assert bool(made.notes) == (examples < 4), "fewer rows than copies: the rest is padding"


# --- nodes


STEPS = {"maxSteps": 3000}


def test_the_fewest_nodes_that_finish_in_time_are_chosen() -> None:
    made = planned(parallelism={"maxHours": 3}, training=STEPS)
    assert made.layout.nodes == 3
    assert made.layout.global_batch == 12, "more nodes share the rows of one node's step"
    assert made.estimate is not None
    assert made.estimate.training_hours is not None
    assert made.estimate.training_hours[1] + made.estimate.compile_hours[1] <= 3
    assert "takes 1.5 to 4.2 h" in rejected(made, "nodes", 1)
    assert rejected(made, "nodes", 2).endswith("more than parallelism.maxHours 3")
    assert planned(parallelism={"maxHours": 100}, training=STEPS).layout.nodes == 1
    assert planned(nodes=4, parallelism={"maxHours": 100}, training=STEPS).layout.nodes == 4


def test_hours_that_are_too_few_or_unknown_are_refused() -> None:
    assert refused(parallelism={"maxHours": 3}).endswith("Set training.maxSteps, or nodes instead of maxHours.")
    assert "on 1 node takes" in refused(
        instance="trn2.3xlarge", parallelism={"maxHours": 1}, training={"maxSteps": 99999}
    )
    assert "on 2 nodes takes" in refused(nodes=2, parallelism={"maxHours": 1.5}, training=STEPS)
    assert refused(parallelism={"maxHours": 0.1}, training=STEPS).startswith(
        "parallelism.maxHours: the run on 64 nodes takes"
    )
    assert "requires Trainium" in refused(instance="cpu", parallelism={"maxHours": 3}, training=STEPS)
    compiling = refused(parallelism={"maxHours": 1}, training={"maxSteps": 1})
    assert compiling.endswith("compiling and starting take longer.")
    endless = refused(parallelism={"maxHours": 3}, training={"maxSteps": 1_000_000})
    assert "more than 64 nodes are not tried" in endless
    assert "fewer steps" in endless


# --- unknown facts


def test_an_unknown_model_gets_the_default_layout_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump({**LEAST, "model": "some/body"}))
    layout = checked(Sources((file,))).plan.layout
    assert (layout.tensor_parallel, layout.data_parallel, layout.checkpointing) == (8, 4, "selective")
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1
    assert "The architecture of some/body is unknown" in told
    assert told.startswith(f"warning: {file}:")
    made = planned(model={"path": "/workspace/models/mine"})
    assert made.memory is made.estimate is None
    assert "on the volume" in made.notes[0].text


def test_a_refusal_is_reported_at_the_place_of_its_key(tmp_path: Path) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(LEAST) + "training:\n  globalBatchSize: 10\n")
    with pytest.raises(UserError) as told:
        checked(Sources((file,)))
    assert str(told.value).startswith(f"{file}:7:3 training.globalBatchSize: 10 is not ")


def test_the_cpu_needs_no_model_sizes() -> None:
    made = planned(model="some/body", instance="cpu", training={"globalBatchSize": 6})
    assert (made.layout.data_parallel, made.layout.accumulation) == (2, 3)
    assert made.notes == ()
    assert "3 does not divide the 2 processes" in refused(instance="cpu", parallelism={"tensorParallelSize": 3})
    split = planned(instance="cpu", cpu={"processes": 4}, parallelism={"tensorParallelSize": 2, "shardSize": 2}).layout
    assert (split.tensor_parallel, split.data_parallel, split.shard_size) == (2, 2, 2)


def test_chart_values_that_override_the_plan_are_noted() -> None:
    assert "does not include chartValues.training" in planned(chartValues={"training": {"seed": 3}}).notes[0].text
    assert planned(chartValues={"kueue": {"queueName": "a"}}).notes == ()
