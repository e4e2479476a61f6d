"""What is chosen and what is refused for backend native on Trn2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from genvalues.accelerators import instances
from genvalues.accelerators.architectures import known, table
from genvalues.accelerators.native_memory import NativeMemory
from genvalues.accelerators.native_rules import size_problems
from genvalues.planner import dataset
from genvalues.planner.candidates import gib, host_memory_note
from genvalues.planner.layout import Refused, Run
from genvalues.planner.planning import Plan, gather_facts, plan
from genvalues.settings.inputs import inputs_from

ROOT = Path(__file__).parents[3]
TRN2 = [name for name, found in instances.TRAINIUM.items() if found.generation is instances.TRN2]
LEAST = {"model": "meta-llama/Llama-3.1-8B", "dataset": {"source": "a/b"}, "instance": "trn2.48xlarge", "image": "a:1"}
TP, SHARD = "parallelism.tensorParallelSize", "parallelism.shardSize"


def planned(rows: dataset.Examples | None = None, **written: Any) -> Plan:
    """The plan of a run. ``rows``: the Hub's count."""
    inputs = inputs_from({**LEAST, **written})
    return plan(inputs, gather_facts(inputs, offline=True)._replace(of_hub=rows))


def refused(**written: Any) -> tuple[str, str, str]:
    """Key, what and fix of the first problem."""
    with pytest.raises(Refused) as told:
        planned(**written)
    first = told.value.problems[0]
    return ".".join(map(str, first.keys[0])), first.what, first.fix


def chosen(made: Plan, key: str) -> str:
    [reason] = [each.reason for each in made.choices if each.key == key]
    return reason


def rejected(made: Plan, key: str, value: Any) -> str:
    [found] = [each.reason for each in made.rejected if (each.key, each.value) == (key, value)]
    return found


@pytest.mark.parametrize("instance", TRN2)
@pytest.mark.parametrize("model", [row["models"][0] for row in table().values()])
def test_every_chosen_layout_satisfies_the_rules(model: str, instance: str) -> None:
    architecture, found = known(model), instances.TRAINIUM[instance]
    assert architecture is not None
    try:
        made = planned(model=model, instance=instance, lora={"targetModules": "all-linear"})
    except Refused as told:
        assert architecture.parameters > 30e9 and instance == "trn2.3xlarge", told
        assert "Use trn2.48xlarge or trn2u.48xlarge" in told.problems[0].fix
        return
    layout = made.layout
    assert list(size_problems(architecture, layout.tensor_parallel)) == []
    assert {layout.tensor_parallel, layout.shard_size} <= set(found.groups)
    assert layout.tensor_parallel * layout.data_parallel == found.cores
    assert layout.data_parallel % layout.shard_size == 0
    assert isinstance(made.memory, NativeMemory) and made.memory.fits
    assert {each.value for each in made.rejected if each.key == TP} | {layout.tensor_parallel} >= set(found.groups)


def test_the_fewest_copies_that_fit_share_the_base_weights() -> None:
    small, medium = planned(model="meta-llama/Llama-3.2-1B"), planned()
    assert small.layout.shard_size == 1 and "no weights are exchanged" in chosen(small, SHARD)
    assert medium.layout.shard_size == 4 and "1 would use 27." in chosen(medium, SHARD)
    assert "does not fit" in rejected(medium, SHARD, 1)
    assert "works (" in rejected(medium, SHARD, 16) and "more cores" in rejected(medium, SHARD, 16)
    large = planned(model="meta-llama/Llama-3.1-70B").layout
    assert (large.tensor_parallel, large.shard_size, large.checkpointing) == (1, 64, "full")


def test_weights_are_sharded_before_whole_layers_are_recomputed() -> None:
    made = planned()
    assert made.layout.checkpointing == "selective"
    kept = planned(parallelism={"shardSize": 1}).layout
    assert (kept.shard_size, kept.checkpointing) == (1, "full")


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"])
def test_tensor_parallelism_is_not_used_where_memory_and_batch_do_not_need_it(model: str) -> None:
    made = planned(model=model)
    assert made.layout.tensor_parallel == 1
    assert "not needed" in chosen(made, TP)
    assert "key-value heads are not divisible by 16" in rejected(made, TP, 16)
    assert "process groups of 1, 4, 16 or 64, not of 8" in rejected(made, TP, 8)


def test_tensor_parallelism_is_used_where_one_row_does_not_fit_on_a_core() -> None:
    made = planned(training={"maxSequenceLength": 8192})
    assert made.layout.tensor_parallel == 4
    assert "1 does not work: needs 3" in chosen(made, TP)


def test_a_small_global_batch_is_kept_with_tensor_parallelism() -> None:
    """64 cores, 16 rows: a copy of the model on each core would have nothing to do."""
    made = planned(training={"globalBatchSize": 16})
    assert (made.layout.global_batch, made.layout.tensor_parallel, made.layout.data_parallel) == (16, 4, 16)
    assert "16 is not divisible by 64 copies" in chosen(made, TP)


@pytest.mark.parametrize(("batch", "nearest"), [(8, "Use 16"), (100, "Use 96 or 112"), (2, "Use 16")])
def test_a_global_batch_that_no_layout_has_is_refused_with_the_nearest_and_a_smaller_instance(
    batch: int, nearest: str
) -> None:
    key, what, fix = refused(training={"globalBatchSize": batch})
    assert key == "training.globalBatchSize"
    assert f"{batch} is not divisible by 64 copies" in what
    assert fix.startswith(nearest)
    assert fix.endswith("or set instance to trn2.3xlarge, which has 4 cores.")
    assert planned(instance="trn2.3xlarge", training={"globalBatchSize": batch}).layout.global_batch == batch


@pytest.mark.parametrize(("instance", "batch"), [("trn2.3xlarge", 12), ("trn2.48xlarge", 64)])
def test_a_step_has_at_least_twelve_rows_by_default(instance: str, batch: int) -> None:
    assert planned(instance=instance).layout.global_batch == batch


def test_a_small_dataset_on_many_cores_is_noted_with_fewer_cores() -> None:
    few = planned(dataset.Examples(1000, 800_000))
    [note] = [note for note in few.notes if "optimizer step" in note.text]
    assert note.warns and "trn2.3xlarge, which has 4 cores" in note.text and "tensorParallelSize" in note.text
    less_than_a_step = planned(dataset.Examples(20, 20_000), training={"packing": False})
    [note] = [note for note in less_than_a_step.notes if "A step takes 64 rows" in note.text]
    assert "trn2.3xlarge" in note.text
    assert planned(dataset.Examples(1_000_000, 800_000_000)).notes == ()
    own = {"globalBatchSize": 64}
    assert planned(dataset.Examples(1000, 800_000), training=own).notes == (), "the user's own batch"
    assert not any(
        "instance" in note.text for note in planned(dataset.Examples(100, 80_000), instance="trn2.3xlarge").notes
    )


def test_shard_sizes_in_the_inputs_are_kept_or_refused_at_their_key() -> None:
    assert planned(parallelism={"shardSize": 64}).layout.shard_size == 64
    key, what, fix = refused(parallelism={"shardSize": 8})
    assert (key, fix) == (SHARD, "Use 1, 4, 16 or 64.") and "not of 8" in what
    key, what, fix = refused(model="meta-llama/Llama-3.1-70B", parallelism={"shardSize": 1})
    assert (key, fix) == (SHARD, "Use 4, 16 or 64, or remove it.") and "per core" in what


def test_a_shard_size_that_the_batch_leaves_no_copies_for_is_refused() -> None:
    """16 rows need tensor parallelism on 64 cores, which leaves 16 copies."""
    key, what, fix = refused(training={"globalBatchSize": 16}, parallelism={"shardSize": 64})
    assert (key, fix) == (SHARD, "Use 1, 4 or 16, or remove it.") and "16 copies" in what


def test_a_model_that_does_not_fit_is_refused_with_the_instances_of_native_that_fit() -> None:
    key, what, fix = refused(model="meta-llama/Llama-3.1-70B", instance="ml.trn2.3xlarge")
    assert key == "instance"
    assert "shardSize" in what and "gathered weights" in what
    assert "ml.trn2.48xlarge" in fix and "trn1" not in fix


def test_70b_on_trn2_says_which_choice_fits() -> None:
    model = "meta-llama/Llama-3.3-70B-Instruct"
    assert planned(model=model, instance="trn2.48xlarge").layout.shard_size > 1
    key, _, fix = refused(model=model, instance="trn2.48xlarge", backend="xla")
    assert key == "backend" and "native" in fix
    key, _, fix = refused(model=model, instance="trn2.48xlarge", parallelism={"shardSize": 1})
    assert key == SHARD and "4, 16 or 64" in fix
    for others in ({"backend": "xla"}, {"parallelism": {"shardSize": 1}}):
        key, _, fix = refused(model=model, instance="ml.trn2.3xlarge", **others)
        assert key == "instance" and "ml.trn2.48xlarge" in fix


def test_an_unknown_model_shares_its_weights_as_widely_as_possible() -> None:
    made = planned(model={"path": "/workspace/model"})
    assert (made.layout.tensor_parallel, made.layout.shard_size) == (1, 64)
    assert made.memory is made.estimate is None


@pytest.mark.parametrize(
    ("length", "format_", "attention"),
    [(2048, "text", "causal"), (512, "text", "causal"), (2048, "chat", "isolated")],
)
def test_causal_attention_is_chosen_for_text(length: int, format_: str, attention: str) -> None:
    written = {"dataset": {"source": "a/b", "format": format_}, "training": {"maxSequenceLength": length}}
    assert planned(**written).attention == attention


def test_the_memory_of_the_other_attention_is_told() -> None:
    isolated, causal = planned(training={"attention": "isolated"}), planned(training={"attention": "causal"})
    attention = "training.attention"
    for made, other, words in ((isolated, "causal", "packed example"), (causal, "isolated", "scores")):
        assert made.memory is not None and made.attention != other
        assert words in rejected(made, attention, other)
    assert isolated.memory is not None and causal.memory is not None
    assert f"works ({gib(causal.memory.total)} GiB" in rejected(isolated, attention, "causal")
    assert f"works ({gib(isolated.memory.total)} GiB" in rejected(causal, attention, "isolated")
    large = planned(training={"attention": "causal", "maxSequenceLength": 8192})
    assert "does not fit" in rejected(large, attention, "isolated")


def test_a_node_reads_the_model_once_whatever_the_number_of_its_workers() -> None:
    """70B in bf16 are 131 GiB; 64 workers have 3 GiB of libraries each."""
    made = planned(model="meta-llama/Llama-3.1-70B")
    assert "host memory" not in " ".join(note.text for note in made.notes)
    architecture, node = known("meta-llama/Llama-3.1-70B"), instances.TRAINIUM["trn2.48xlarge"]
    assert architecture is not None
    run = Run("trn2.48xlarge", "native", 2048, "causal", 16, ("q_proj",), False)
    note = host_memory_note(run, architecture, replace(node, request_memory_gib=320), 1)
    assert note is not None and "323 of the pod's 320 GiB" in note.text


def test_rows_of_a_length_that_the_device_does_not_take_are_refused() -> None:
    key, what, fix = refused(training={"maxSequenceLength": 1000})
    assert (key, fix) == ("training.maxSequenceLength", "Use 512 or 1024.") and "multiple of 512" in what


def test_a_plan_says_what_is_proven_and_what_is_a_guess() -> None:
    made = planned(training={"maxSteps": 100})
    assert "proven on CPUs" in made.backend_status and "guesses" in made.backend_status
    guesses = [source for _, source in made.assumptions if source.startswith("a guess")]
    assert len(guesses) == 2, "the share of the peak, and compiling"
    xla = planned(instance="trn1.32xlarge").backend_status
    assert "SDK 2.30" in xla and "May 2026" in xla and "Trn2" in xla


def test_the_facts_of_a_model_do_not_depend_on_the_backend() -> None:
    native, xla = planned(), planned(backend="xla")
    assert (native.backend, xla.backend) == ("native", "xla")
    assert native.model == xla.model
    assert isinstance(native.memory, NativeMemory) and not isinstance(xla.memory, NativeMemory)
