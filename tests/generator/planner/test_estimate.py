"""FLOPs, hours and dollars before the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from genvalues.accelerators.architectures import LINEAR, Architecture, from_config, known, table
from genvalues.accelerators.instances import TRAINIUM
from genvalues.planner import dataset
from genvalues.planner.estimate import (
    UTILIZATION,
    Flops,
    assumptions,
    cpu_node_hours,
    estimate,
    flops_per_token,
    training_hours,
    work,
)
from genvalues.planner.layout import Layout, Run
from genvalues.planner.planning import epoch_rows, gather_facts
from genvalues.planner.prices import Price
from genvalues.settings.inputs import DatasetInputs, inputs_from

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[3]
LLAMA_8B = known("meta-llama/Llama-3.1-8B")
QV = ("q_proj", "v_proj")
RUN = Run("trn1.32xlarge", "xla", 2048, "isolated", 16, QV, True)


def flops(a: Architecture, run: Run, checkpointing: str = "selective") -> Flops:
    return flops_per_token(a, run, Layout(1, 32, 8, 4, 1, 3, checkpointing))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "granite-3.0-2b"])
def test_flops_equal_those_that_torch_counts(name: str) -> None:
    """Forward and backward of a frozen base with LoRA, of a model with two layers, by torch's counter."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    small = {"num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "head_dim": 32}
    config = {**table()[name]["config"], **small, "num_attention_heads": 8, "num_key_value_heads": 4}
    a = from_config(config)
    kind = {**config}
    length = 256
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind.pop("model_type"), **kind), attn_implementation="eager"
        )
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=list(LINEAR)))
        ids = torch.zeros((1, length), dtype=torch.long)
        mask = torch.zeros((1, 1, length, length))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum().backward()
    counted = flops(a, RUN._replace(length=length, targets=tuple(LINEAR)), "none")
    # The first layer of a frozen base needs no gradient of its input, which saves 2 P of q, k and v.
    first = 2.0 * a.hidden * (a.query + 2 * a.key)
    assert counter.get_total_flops() / length == pytest.approx(counted.total - first, rel=0.02)


def test_recomputation_costs_what_it_recomputes() -> None:
    assert LLAMA_8B is not None
    none, selective, full = (flops(LLAMA_8B, RUN, each) for each in ("none", "selective", "full"))
    scores = 4 * 32 * 4096 * 2048
    assert none.again == 0
    assert selective.again == scores
    assert full.again == 2 * 32 * LLAMA_8B.layer_linear_parameters + scores
    assert flops(LLAMA_8B, RUN._replace(attention="causal")).again == 0
    block = 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert flops(LLAMA_8B, RUN._replace(backend="native")).again == block + scores, "with q, k, v and o"
    assert flops(LLAMA_8B, RUN._replace(backend="native", attention="causal")).again == block + scores / 2
    assert none.forward == 2 * (LLAMA_8B.parameters - 128256 * 4096 - 65 * 4096) + scores
    assert none.backward == none.forward + scores, "gradients of activations, none of weights"


def test_the_upper_end_of_utilization_of_native_is_a_users_measurement() -> None:
    """6,600 tokens per second of LoRA on Qwen3 1.7B, rows of 1024 tokens, one Trn2 device."""
    a = known("Qwen/Qwen3-1.7B")
    assert a is not None
    run = RUN._replace(backend="native", instance="trn2.3xlarge", length=1024)
    instance = TRAINIUM["trn2.3xlarge"]
    measured = [6600 * flops(a, run, each).total / instance.cores / instance.flops for each in ("none", "selective")]
    assert all(0.06 < each <= UTILIZATION["native"][1] for each in measured)


def test_the_upper_end_of_utilization_is_the_measurement_of_aws() -> None:
    """47.95 rows of 8192 tokens per second on 32 trn1.32xlarge, Llama 3.1 8B, by PaLM's formula."""
    assert LLAMA_8B is not None
    measured = 47.95 * 8192 * (6 * LLAMA_8B.parameters + 12 * 32 * 4096 * 8192)
    instance = TRAINIUM["trn1.32xlarge"]
    peak = 32 * instance.cores * instance.flops
    assert peak == 32 * 16 * 190e12
    assert measured / peak == pytest.approx(UTILIZATION["xla"][1], abs=0.005)


@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps", "steps"),
    [
        ((100, 100), 1, None, (9, 9)),
        ((100, 150), 2, None, (17, 25)),
        ((5, 5), 0.5, None, (1, 1)),
        ((100, 100), 1, 7, (7, 7)),
        (None, 1, 7, (7, 7)),
        (None, 1, None, None),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    rows: tuple[int, int] | None, epochs: float, max_steps: int | None, steps: tuple[int, int] | None
) -> None:
    from llama_lora.backends.step_plan import StepPlan
    from llama_lora.config import Training

    run = RUN._replace(epochs=epochs, max_steps=max_steps, rows_unknown="unknown")
    todo = work(run, rows, 12)
    assert todo.steps == steps
    assert todo.tokens == (steps and tuple(each * 12 * 2048 for each in steps))
    if rows and steps:
        values = yaml.safe_load((ROOT / "values/trn1.values.yaml").read_text())["training"]
        training = Training.model_validate({**values, "epochs": epochs, "maxSteps": max_steps})
        assert tuple(StepPlan(number, 4, training).total_steps for number in rows) == steps


def test_hours_and_dollars_follow_from_tokens_nodes_and_price() -> None:
    assert LLAMA_8B is not None
    run = RUN._replace(max_steps=1000)
    todo = work(run, None, 12)

    def costed(nodes: int, price: float | None = 20.0, on_cpu: bool = False):  # type: ignore[no-untyped-def]
        return estimate(
            LLAMA_8B,
            run._replace(compile_on_cpu=on_cpu),
            TRAINIUM["trn1.32xlarge"],
            Layout(nodes, 32, 8, 4 * nodes, 1, 3, "selective"),
            todo,
            Price(price, "test") if price else None,
            cpu_stages={},
        )

    one, two = costed(1), costed(2)
    tokens = 1000 * 12 * 2048
    assert one.training_hours[0] == pytest.approx(tokens / one.tokens_per_second[1] / 3600 + 0.1)
    assert one.training_hours[1] == pytest.approx(tokens / one.tokens_per_second[0] / 3600 + 0.3)
    assert two.tokens_per_second == tuple(2 * each for each in one.tokens_per_second)
    assert one.trainium_node_hours == (one.training_hours[0] + 0.5, one.training_hours[1] + 1.0)
    assert two.trainium_node_hours[0] == pytest.approx(2 * (two.training_hours[0] + 0.5))
    assert one.dollars == tuple(20 * each for each in one.trainium_node_hours)
    assert two.step_seconds[0] == pytest.approx(one.step_seconds[0] / 2)
    assert costed(1, price=None).dollars is None
    assert costed(1, on_cpu=True).trainium_node_hours[1] < one.trainium_node_hours[1]
    low, high = one.dollars
    assert 10 < low < high < 100


def test_measuring_the_held_out_loss_costs_a_forward_pass_for_each_row() -> None:
    assert LLAMA_8B is not None
    layout = Layout(1, 32, 8, 4, 1, 3, "selective")

    def hours(**settings: int) -> float:
        run = RUN._replace(max_steps=1000, **settings)
        found = training_hours(LLAMA_8B, run, layout, work(run, None, 12), (1e5, 1e5))
        assert found is not None
        return found[0]

    each = flops(LLAMA_8B, RUN)
    rows = (1 + 10) * 8  # 7 rows are padded to two batches of the four copies
    seconds = rows * 2048 * each.forward / each.total / 1e5
    assert hours(eval_steps=100, eval_rows=7) - hours() == pytest.approx(seconds / 3600)
    assert hours(eval_steps=999, eval_rows=7) - hours() == pytest.approx(seconds / 3600 * 3 / 11)


def test_stages_on_cpu_nodes_are_counted_separately() -> None:
    assert LLAMA_8B is not None
    wanted = {"probe_tokens": 4096, "generated_tokens": 128, "max_eval_hours": 0}
    stages = cpu_node_hours(
        LLAMA_8B, eval_tokens=(256 * 100, 256 * 2048), compile_on_cpu=True, rehearses=True, **wanted
    )
    assert list(stages) == ["tokenize", "consolidate", "merge", "rehearse", "neff", "evaluate"]
    assert all(0 < low <= high for low, high in stages.values())
    low, high = (2 * 2 * LLAMA_8B.matrix_parameters * 256 / 3600 * each for each in (100 / 1.5e12, 2048 / 0.1e12))
    assert low < stages["evaluate"][0] < 10 * low, "base and merged, one forward pass each"
    assert high < stages["evaluate"][1] < 2 * high and high > 5
    bounded = cpu_node_hours(
        LLAMA_8B,
        eval_tokens=(256 * 100, 256 * 2048),
        compile_on_cpu=True,
        rehearses=True,
        **{**wanted, "max_eval_hours": 2},
    )
    assert bounded["evaluate"] == (stages["evaluate"][0], 2), "evaluation.maxHours"
    without = cpu_node_hours(LLAMA_8B, eval_tokens=(0, 0), compile_on_cpu=False, rehearses=False, **wanted)
    assert {"rehearse", "neff", "evaluate"}.isdisjoint(without)


def test_every_assumption_has_a_source() -> None:
    for backend, on_cpu in (("xla", False), ("xla", True), ("native", False)):
        told = assumptions(RUN._replace(backend=backend, compile_on_cpu=on_cpu))
        assert all(assumed and source for assumed, source in told)
        if backend == "native":
            assert [source.startswith("a guess") for _, source in told[:2]] == [True, True]


# --- the rows of a file


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}', 2),
        ("a.txt", "one\n\ntwo\nthree", 3),
        ("a.csv", 'text\n"a\nb"\nc\n', 2),
        ("a.json", json.dumps([{"text": "a"}] * 5), 5),
        ("a.json", json.dumps({"data": [{"text": "a"}] * 5}), 5),
        ("A.NDJSON", '{"text": "a"}\n{"text": "b"}\n', 2),
        ("a.tsv", "text\tn\na,b\t1\n\nc\t2\n", 2),
        ("a.jsonl.gz", '{"text": "a"}\n' * 9, 9),
        ("a.json", '{"text": "a"}', None),
        ("a.jsonl.zst", "\x28\xb5\x2f\xfd", None),
        ("a.json", "[", None),
        ("a.jsonl", "", None),
        ("a.parquet", "PAR1", None),
    ],
)
def test_a_files_examples_are_counted(tmp_path: Path, name: str, text: str, number: int | None) -> None:
    file = tmp_path / name
    content = text.encode("latin-1")
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = dataset.count(file)
    assert (found and found.number) == number
    if found:
        formats = pytest.importorskip("llama_lora.data.file_formats")
        assert found.number == len(list(formats.read_file(file, pytest.importorskip("llama_lora.data.rows").BadRows())))
        assert found.bytes == len(content)


def test_all_members_of_a_gzip_file_and_only_the_line_breaks_of_csv_are_counted(tmp_path: Path) -> None:
    members, cut, csv = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz", tmp_path / "a.csv"
    members.write_bytes(b"".join(gzip.compress(b"{}\n" * number) for number in (5, 500)))
    assert dataset.count(members) == dataset.Examples(505, 3 * 505)
    cut.write_bytes(members.read_bytes()[:-9])
    assert dataset.count(cut) is None
    csv.write_text("text\n" + "a\u2028b\x85c\n" * 100)
    found = dataset.count(csv)
    assert found and found.number == 100


def test_folders_globs_parts_of_splits_and_weights_are_counted(tmp_path: Path) -> None:
    for name, number in (("train.jsonl", 10), ("more.csv", 21), ("test.jsonl", 40)):
        (tmp_path / name).write_text("{}\n" * number)
    assert dataset.count(tmp_path) == dataset.Examples(30, 93)
    assert dataset.count(tmp_path, "test[:10%]+train[-3:]") == dataset.Examples(7, 12 + 9)
    assert dataset.count(tmp_path / "t*.jsonl") == dataset.Examples(50, 150)
    more: dict[str, Any] = {"source": str(tmp_path), "split": "test", "weight": 0.5}
    wanted = {"source": str(tmp_path / "train.jsonl"), "additional": {"more": more}}
    assert dataset.of_files(DatasetInputs.model_validate(wanted)) == dataset.Examples(30, 90)
    more["source"] = "org/rows"
    assert dataset.of_files(DatasetInputs.model_validate(wanted)) is None


def test_rows_held_out_elsewhere_are_not_taken_from_those_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 100)
    least = {"model": "a/b", "instance": "cpu", "training": {"packing": False}}
    for eval_, number in (({}, 50), ({"source": "a/c"}, 100)):
        rows = {"source": str(tmp_path / "a.jsonl"), "evalFraction": 0.5, "eval": eval_}
        inputs = inputs_from({**least, "dataset": rows})
        assert epoch_rows(inputs, gather_facts(inputs).examples) == (number, number)


def test_a_missing_or_too_large_file_is_not_counted(tmp_path: Path) -> None:
    assert dataset.count(tmp_path / "none.jsonl") is None
    assert dataset.count(tmp_path) is None, "an empty folder"
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(dataset.MOST_BYTES + 1)
    assert dataset.count(large) is None


def test_packed_rows_are_a_range_and_no_more_than_the_examples() -> None:
    examples = dataset.Examples(1000, 6_000_000)
    assert examples.rows(1000, False, 0.0) == (1000, 1000)
    assert examples.rows(1000, False, 0.5) == (500, 500)
    assert examples.rows(10_000, True, 0.0) == (100, 200)
    assert examples.rows(100, True, 0.0) == (1000, 1000)


def test_long_texts_are_split_into_more_rows_than_there_are_texts(tmp_path: Path) -> None:
    file = tmp_path / "books.jsonl"
    file.write_text((json.dumps({"text": "word " * 24_000}) + "\n") * 10)
    least: dict[str, Any] = {"model": "a/b", "instance": "cpu", "training": {"maxSequenceLength": 1000}}
    wanted: dict[str, Any] = {"source": str(file), "format": "text", "evalFraction": 0}

    def rows(packing: bool = True, **more: Any) -> tuple[int, int] | None:
        training = {**least["training"], "packing": packing}
        inputs = inputs_from({**least, "training": training, "dataset": {**wanted, **more}})
        return epoch_rows(inputs, gather_facts(inputs).examples)

    assert rows() == (200, 400) and rows(packing=False) == (200, 400)
    assert rows(overlong="truncate") == rows(overlong="drop", packing=False) == (10, 10)
    assert rows(format="instruction") == (10, 10)
    other = {"source": str(file), "format": "instruction"}
    assert rows(additional={"a": other}) == (400, 800), "those of text are split"
