"""What is derived from an inputs file, and that the chart takes it."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from genvalues import __version__
from genvalues.accelerators import instances
from genvalues.accelerators.instances import default_backend
from genvalues.common.errors import UserError
from genvalues.inputs import chart
from genvalues.inputs.chart import on_top_of_defaults
from genvalues.inputs.input_options import Sources
from genvalues.inputs.values import values_from
from genvalues.inputs.write import checked, text_of
from genvalues.inputs.yaml_text import dump
from genvalues.planner.layout import Layout
from genvalues.planner.planning import gather_facts, plan
from genvalues.settings.inputs import inputs_from
from genvalues.settings.schemas import inputs_schema

ROOT = Path(__file__).parents[3]
CHART = ROOT / "chart"
ENVIRONMENTS = sorted(path.name.removesuffix(".values.yaml") for path in (ROOT / "values").glob("*.values.yaml"))

ISSUE = """\
name: llama-lora
model: meta-llama/Meta-Llama-3.1-8B     # hub id, id@revision, or {path: /somewhere}
dataset:
  source: databricks/databricks-dolly-15k
  format: instruction
  columns: {instruction: instruction, input: context, output: response}
  evalFraction: 0.02
instance: ml.trn1.32xlarge
nodes: 1
lora: {r: 16, alpha: 16, dropout: 0.05, targetModules: [q_proj, v_proj]}
training: {maxSequenceLength: 2048, packing: true, perDeviceBatchSize: 1, gradientAccumulationSteps: 3, epochs: 1, maxSteps: null, learningRate: 5.0e-5, lrScheduler: linear, warmupRatio: 0.03, weightDecay: 0.0, maxGradNorm: 1.0, saveSteps: 100, saveTotalLimit: 2, seed: 42}
evaluation: {maxRows: 256, samples: 4, maxNewTokens: 128}
storage: {kind: fsx, size: 1200Gi, storageClass: fsx-sc}
huggingFace: {tokenSecret: hf-token, tokenKey: token}
image: 123456789012.dkr.ecr.us-west-2.amazonaws.com/llama-lora@sha256:%s
mode: detached
chartValues: {}
""" % ("0" * 64)  # noqa: E501


def written(sources: Sources, output: Path | None = None) -> str:
    return text_of(checked(sources), sources, output)


def values_of(tmp_path: Path, text: str, *sets: str) -> dict[str, Any]:
    file = tmp_path / "finetune.yaml"
    file.write_text(text)
    values: dict[str, Any] = yaml.safe_load(written(Sources((file,), tuple(sets), CHART)))
    return values


def test_every_key_of_the_inputs_is_described_and_every_number_has_its_range() -> None:
    schema = inputs_schema()
    for block in [schema, *schema["$defs"].values()]:
        for name, key in block["properties"].items():
            assert key.get("description"), name
            for branch in [key, *key.get("anyOf", [])]:
                if branch.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & branch.keys(), name
                    assert {"maximum", "exclusiveMaximum"} & branch.keys(), name


def test_the_example_gives_tensor_parallel_8_data_parallel_4_on_32_processes(tmp_path: Path) -> None:
    values = values_of(tmp_path, ISSUE)
    assert values["parallelism"] == {
        "nodes": 1,
        "processesPerNode": 32,
        "tensorParallelSize": 8,
        "dataParallelSize": 4,
        "shardSize": 1,
    }
    assert values["devices"] == {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8}
    assert (values["backend"], values["pipeline"]) == ("xla", {"mode": "detached"})
    assert values["model"] == {"id": "meta-llama/Meta-Llama-3.1-8B", "revision": "", "path": ""}
    assert values["dataset"]["columns"] == {"input": "context", "output": "response"}
    assert values["image"]["digest"] == f"sha256:{'0' * 64}"
    assert values["hyperpod"]["autoResume"] is True


def test_what_is_left_out_has_the_defaults_of_the_example(tmp_path: Path) -> None:
    keys = ("model", "dataset", "instance", "image")
    short = yaml.safe_dump({key: value for key, value in yaml.safe_load(ISSUE).items() if key in keys})
    assert values_of(tmp_path, short) == values_of(tmp_path, ISSUE)
    assert values_of(tmp_path, short + "huggingFace: null\n")["huggingFace"]["tokenSecret"] == ""


SHARED = (
    *("lora", "training", "probe", "compile", "evaluation", "huggingFace", "parallelism", "rehearse", "hyperpod"),
)


def test_the_inputs_defaults_are_the_charts() -> None:
    defaults = on_top_of_defaults(CHART, {})
    least = inputs_from({"model": "a/b", "dataset": {"source": "a/b"}, "instance": "cpu"})
    derived = values_from(least, plan(least, gather_facts(least)))
    for section in SHARED:
        assert derived[section] == defaults[section]
    assert derived["devices"] == defaults["devices"]


def test_cpu_needs_three_keys_and_runs_attached(tmp_path: Path) -> None:
    values = values_of(
        tmp_path, "model: gpt2@main\ndataset: {source: a/b}\ninstance: cpu\nnodes: 2\ncpu: {processes: 3}\n"
    )
    assert (values["backend"], values["devices"], values["pipeline"]) == ("native", {}, {"mode": "attached"})
    assert values["model"] == {"id": "gpt2", "revision": "main", "path": ""}
    assert values["huggingFace"]["tokenSecret"] == ""
    assert values["storage"]["kind"] == "generic"
    assert list(values["parallelism"].values()) == [2, 3, 1, 6, 1]


def layout_of(instance: str, nodes: int) -> Layout:
    least = {"model": "a/b", "dataset": {"source": "a/b"}, "image": "a:1"}
    inputs = inputs_from({**least, "instance": instance, "nodes": nodes})
    return plan(inputs, gather_facts(inputs)).layout


MEMORY_GIB = {  # of a node: the AWS instance pages
    "trn1.2xlarge": 32,
    "trn1.32xlarge": 512,
    "trn1n.32xlarge": 512,
    "trn2.3xlarge": 128,
    "trn2.48xlarge": 2048,
    "trn2u.48xlarge": 2048,
}


@pytest.mark.parametrize("name", instances.TRAINIUM)
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_every_core_of_every_instance_has_a_process(name: str, nodes: int) -> None:
    layout, instance = layout_of(name, nodes), instances.TRAINIUM[name]
    assert layout.processes_per_node == instance.cores
    assert layout.tensor_parallel * layout.data_parallel == nodes * layout.processes_per_node
    assert instance.cores % layout.tensor_parallel == 0  # a tensor-parallel group stays within a node
    assert instance.request_cpu < instance.vcpu
    assert instance.request_memory_gib < MEMORY_GIB[name] * 0.9
    if instance.hyperpod:
        assert layout_of(instances.HYPERPOD + name, nodes) == layout


ON_TRAINIUM = "model: meta-llama/Llama-3.1-8B\ndataset: {source: a/b, format: %s}\ninstance: %s\nimage: a/b:1\n"


def test_attention_is_isolated_where_one_source_has_conversations(tmp_path: Path) -> None:
    text, more = ON_TRAINIUM % ("text", "trn1.32xlarge"), "dataset.additional.more."
    sets = ["training.maxSequenceLength=2048", f"{more}source=a/c"]
    assert values_of(tmp_path, text, *sets)["training"]["attention"] == "causal"
    assert values_of(tmp_path, text, *sets, f"{more}format=chat")["training"]["attention"] == "isolated"


@pytest.mark.parametrize(
    ("format_", "instance", "length", "attention"),
    [
        ("text", "trn1.32xlarge", 2048, "causal"),
        ("text", "ml.trn2.48xlarge", 8192, "causal"),
        ("text", "trn1.32xlarge", 3072, "isolated"),
        ("text", "cpu", 2048, "isolated"),
        ("instruction", "trn1.32xlarge", 2048, "isolated"),
        ("chat", "trn1.32xlarge", 2048, "isolated"),
    ],
)
def test_attention_is_causal_where_a_row_is_one_text_and_the_kernel_takes_it(
    tmp_path: Path, format_: str, instance: str, length: int, attention: str
) -> None:
    text = ON_TRAINIUM % (format_, instance)
    assert values_of(tmp_path, text, f"training.maxSequenceLength={length}")["training"]["attention"] == attention
    written = values_of(tmp_path, text, "training.attention=eager", f"training.maxSequenceLength={length}")
    assert written["training"]["attention"] == "isolated", "its older word"


@pytest.mark.parametrize("below", ["", "chartValues."])
def test_flash_that_cannot_work_is_a_mistake_with_its_fix(tmp_path: Path, below: str) -> None:
    flash = f"{below}training.attention=flash"
    with pytest.raises(UserError) as refused:
        values_of(tmp_path, ON_TRAINIUM % ("text", "trn1.32xlarge"), flash, "training.maxSequenceLength=3000")
    assert "a multiple of 2048, not 3000" in str(refused.value)
    assert "Set maxSequenceLength to 2048 or 4096, or set attention to isolated" in str(refused.value)


@pytest.mark.parametrize(
    ("format_", "packing", "warned"), [("chat", True, True), ("chat", False, False), ("text", True, False)]
)
def test_flash_over_packed_examples_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str, packing: bool, warned: bool
) -> None:
    sets = ("training.attention=flash", f"training.packing={str(packing).lower()}")
    assert values_of(tmp_path, ON_TRAINIUM % (format_, "trn1.32xlarge"), *sets)["training"]["attention"] == "causal"
    told = capsys.readouterr().err
    expected = "warning: --set training.attention=flash: "
    assert (told.startswith(expected) and "each packed example of format chat" in told) if warned else told == ""


def memory_of(stages: dict[str, Any], stage: str) -> tuple[int, int]:
    """GiB that a stage requests, and its limit."""
    resources = stages[stage]["resources"]
    request, limit = (int(resources[bound]["memory"].removesuffix("Gi")) for bound in ("requests", "limits"))
    return request, limit


def test_what_computes_with_the_model_gets_the_memory_that_the_model_needs(tmp_path: Path) -> None:
    stages = values_of(tmp_path, ISSUE)["stages"]
    assert [memory_of(stages, stage) for stage in ("consolidate", "merge", "evaluate")] == [(5, 8), (5, 8), (21, 32)]
    llama_70b = ("model=meta-llama/Llama-3.1-70B", "instance=trn1.32xlarge", "lora.targetModules=all-linear")
    large = values_of(tmp_path, ISSUE, *llama_70b)["stages"]
    for stage in ("consolidate", "merge", "evaluate"):
        request, limit = memory_of(large, stage)
        assert 5 < request <= limit < 24, "far less than the weights of 131 GiB"
    wide = values_of(tmp_path, ISSUE, "lora.r=256", "lora.targetModules=all-linear")["stages"]
    assert memory_of(wide, "merge")[0] > memory_of(stages, "merge")[0], "the adapter is in memory"
    unknown = values_of(tmp_path, ISSUE, "model.path=/workspace/models/x", "lora.targetModules=all-linear")["stages"]
    assert memory_of(unknown, "merge") == memory_of(large, "merge") and memory_of(unknown, "evaluate")[0] >= 40
    unverified = values_of(tmp_path, ISSUE, "probe.rows=0")["stages"]
    assert memory_of(unverified, "merge")[0] < memory_of(stages, "merge")[0]
    unanswered = values_of(tmp_path, ISSUE, "evaluation.samples=0")["stages"]
    assert memory_of(unanswered, "evaluate")[0] < 8 and memory_of(unanswered, "merge") == memory_of(stages, "merge")
    assert "rehearse" in stages
    assert "rehearse" not in values_of(tmp_path, ISSUE, "rehearse.enabled=false")["stages"]
    assert "stages" not in values_of(tmp_path, ON_TRAINIUM % ("text", "cpu")), "the demo's models are small"


def test_compile_and_probe_are_passed_on(tmp_path: Path) -> None:
    sets = ("compile.runsOn=cpu", "compile.onMismatch=warn", "probe.maxTokens=64", "probe.tolerance=0.5")
    values = values_of(tmp_path, ISSUE, *sets, "training.activationCheckpointing=full")
    assert values["compile"] == {"mode": "layers", "onFallback": "refuse", "runsOn": "cpu", "onMismatch": "warn"}
    assert values["probe"] == {"rows": 8, "maxTokens": 64, "tolerance": 0.5}
    assert values["training"]["activationCheckpointing"] == "full"


@pytest.mark.parametrize(
    ("instance", "parallelism", "allowed"),
    [
        ("trn2.48xlarge", {"tensorParallelSize": 8, "dataParallelSize": 8}, "1, 4, 16 or 64"),
        ("trn2.48xlarge", {"tensorParallelSize": 32, "dataParallelSize": 2}, "1, 4, 16 or 64"),
        ("ml.trn1.32xlarge", {"tensorParallelSize": 4, "dataParallelSize": 8}, "1, 2, 8, 16 or 32"),
        ("trn2.3xlarge", {"tensorParallelSize": 2, "dataParallelSize": 2}, "1 or 4"),
    ],
)
def test_groups_of_processes_that_neuron_does_not_have_are_mistakes(
    tmp_path: Path, instance: str, parallelism: dict[str, int], allowed: str
) -> None:
    text = ON_TRAINIUM % ("text", instance) + dump({"chartValues": {"parallelism": parallelism}})
    with pytest.raises(UserError, match=f"{instance} supports process groups of {allowed}, not of"):
        values_of(tmp_path, text)


@pytest.mark.parametrize(("instance", "cores"), [("trn1.2xlarge", 2), ("ml.trn2.48xlarge", 64)])
def test_processes_that_are_not_a_nodes_logical_cores_are_mistakes(tmp_path: Path, instance: str, cores: int) -> None:
    layout = {"processesPerNode": 8, "tensorParallelSize": 1, "dataParallelSize": 8}
    text = ON_TRAINIUM % ("text", instance) + dump({"chartValues": {"parallelism": layout}})
    with pytest.raises(UserError, match=rf"chartValues.parallelism.processesPerNode: .* {cores} logical .* {cores}"):
        values_of(tmp_path, text)


def test_relative_paths_on_the_cpu_are_seen_from_the_inputs_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "llama").mkdir()
    text = "model: {path: llama}\ndataset: {source: ./rows.jsonl}\ninstance: cpu\n"
    values = values_of(tmp_path, text)
    assert values["model"]["path"] == str(tmp_path / "llama")
    assert values["dataset"]["source"] == str(tmp_path / "rows.jsonl")


def test_a_txt_file_is_text_and_no_held_out_rows_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.\n")
    values = values_of(tmp_path, "model: gpt2\ndataset: {source: a.txt, evalFraction: 0}\ninstance: cpu\n")
    assert (values["dataset"]["format"], values["dataset"]["columns"]) == ("text", {})
    assert values["evaluation"]["enabled"] is False


def test_set_changes_keys_and_chart_values_come_last(tmp_path: Path) -> None:
    values = values_of(
        tmp_path,
        ISSUE,
        "training.maxSteps=7",
        "lora.r=8,lora.targetModules=all-linear",
        "chartValues.training.seed=9",
        "chartValues.stages.train.nodeSelector.example\\.com/pool=gold",
        "chartValues.kueue.queueName=five",
    )
    assert (values["training"]["maxSteps"], values["training"]["seed"]) == (7, 9)
    assert (values["lora"]["r"], values["lora"]["alpha"], values["lora"]["targetModules"]) == (8, 16, "all-linear")
    assert values["stages"]["train"]["nodeSelector"] == {"example.com/pool": "gold"}
    assert values["stages"]["train"]["resources"]
    assert values["kueue"] == {"queueName": "five"}


def test_a_number_of_an_environment_variable_keeps_every_digit(tmp_path: Path) -> None:
    env = "{A: 9007199254740993, B: 1.10, C: 1e3, D: 0x10, E: true, F: 010}"
    text = (
        f"model: gpt2\ndataset: {{source: a/b}}\ninstance: cpu\nchartValues: {{stageDefaults: {{extraEnv: {env}}}}}\n"
    )
    variable = "chartValues.stages.train.extraEnv.G=12345678901234567890"
    values = values_of(tmp_path, text, variable)
    expected = {"A": "9007199254740993", "B": "1.10", "C": "1e3", "D": "0x10", "E": True, "F": "010"}
    assert values["stageDefaults"]["extraEnv"] == expected
    assert values["stages"]["train"]["extraEnv"] == {"G": "12345678901234567890"}


def test_a_character_that_json_escapes_as_two_is_one(tmp_path: Path) -> None:
    text = 'model: gpt2\ndataset: {source: a/b, columns: {output: "\\ud83d\\ude00"}}\ninstance: cpu\n'
    assert values_of(tmp_path, text)["dataset"]["columns"] == {"output": "\U0001f600"}


def test_the_same_inputs_give_the_same_bytes_and_name_their_origin(tmp_path: Path) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(ISSUE)
    first, second = (written(Sources((file,), ("lora.r=8",), CHART)) for _ in range(2))
    assert first == second
    assert first.startswith(f"# Written by genvalues {__version__} from finetune.yaml: ")
    assert "#   --set lora.r=8\n" in first
    assert str(tmp_path) not in first


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_committed_values_of_each_environment_are_current(environment: str) -> None:
    output = ROOT / "values" / f"{environment}.values.yaml"
    committed = output.read_text()
    current = written(Sources((ROOT / "values" / f"{environment}.yaml",), (), CHART), output)
    assert committed == current, "run: make values"
    assert str(ROOT) not in committed
    assert "/home/" not in committed


def test_there_are_values_for_the_verified_instances() -> None:
    assert {"cpu", "trn1", "trn1-2node", "trn1n", "trn2"} <= set(ENVIRONMENTS)


@given(
    text=st.text(max_size=12)
    | st.from_regex(r"\A[-+0-9._eExoinfaNyYsO:#~]{1,8}\Z")
    | st.sampled_from(["1e5", "0o17", "1_000", "yes", "y", "N", "on", "null", "1:30", "=", "<<", "2024-01-01"])
)
@example(text="a\x85b\u2028c\u2029d")
def test_text_stays_text_in_every_reader(text: str) -> None:
    """PyYAML reads YAML 1.1 here; Helm, and editors, read 1.2's numbers."""
    from genvalues.inputs.generated_file import with_digest
    from genvalues.inputs.yaml_text import CoreSchemaLoader, load_as_helm

    if any(not (character.isprintable() or character in "\n\t\x85\u2028\u2029") for character in text):
        return
    file = with_digest([], dump({"a": text}))
    assert yaml.safe_load(file) == {"a": text}
    assert yaml.load(file, Loader=CoreSchemaLoader) == {"a": text}
    assert load_as_helm(file) == {"a": text}


# --- round trip: whatever is right for us is right for the chart

NAME = st.from_regex(r"\A[a-z]([-a-z0-9]{0,20}[a-z0-9])?\Z")
HUB_ID = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}\Z")
WORD = st.from_regex(r"\A[A-Za-z0-9_ .-]{1,12}\Z").filter(lambda text: bool(text.strip()))


@functools.cache
def numbers(block: str) -> dict[str, st.SearchStrategy[Any]]:
    """For each number of a block, all values that its schema allows."""
    found: dict[str, st.SearchStrategy[Any]] = {}
    for name, key in inputs_schema()["$defs"][block]["properties"].items():
        for branch in [key, *key.get("anyOf", [])]:
            low = branch.get("minimum", branch.get("exclusiveMinimum"))
            high = branch.get("maximum", branch.get("exclusiveMaximum"))
            if branch.get("type") == "integer":
                found[name] = st.integers(low, high)
            elif branch.get("type") == "number":
                found[name] = st.floats(
                    low, high, exclude_min="minimum" not in branch, exclude_max="maximum" not in branch
                ).filter(lambda number: not math.isclose(number, 0, abs_tol=1e-12) or number == 0)
    return found


# globalBatchSize follows from other keys: any value with any of theirs is a mistake. The others need each other.
NOT_ALONE = {"globalBatchSize", "evalSteps", "earlyStoppingPatience", "earlyStoppingThreshold"}


@st.composite
def right_inputs(draw: st.DrawFn) -> dict[str, Any]:
    instance = draw(st.sampled_from([name for name in instances.NAMES if instances.refusal(name, 1) is None]))
    format_, columns = draw(
        st.sampled_from(
            [
                ("text", ["text"]),
                ("instruction", ["instruction", "input", "output"]),
                ("prompt-completion", ["prompt", "completion"]),
                ("chat", ["messages"]),
            ]
        )
    )
    native = default_backend(instance) == "native"
    all_optional = {
        "name": NAME,
        "nodes": st.just(1) if instances.refusal(instance, 2) else st.integers(1, 64),
        "lora": st.fixed_dictionaries({}, optional=numbers("Lora") | {"targetModules": st.just("all-linear")}),
        "training": st.fixed_dictionaries(
            {},
            optional={name: each for name, each in numbers("TrainingInputs").items() if name not in NOT_ALONE}
            | ({"maxSequenceLength": st.integers(1, 256).map(lambda number: 512 * number)} if native else {})
            | {
                "packing": st.booleans(),
                "lrScheduler": st.sampled_from(["linear", "cosine", "constant"]),
                "attention": st.sampled_from(["isolated", None]),
                "activationCheckpointing": st.sampled_from(["none", "selective", "full"]),
            },
        ),
        "probe": st.fixed_dictionaries({}, optional=numbers("Probe")),
        "compile": st.fixed_dictionaries(
            {},
            optional={
                "runsOn": st.sampled_from(["accelerator"] if native else ["accelerator", "cpu"]),
                "onMismatch": st.sampled_from(["refuse", "warn"]),
            },
        ),
        "evaluation": st.fixed_dictionaries({}, optional=numbers("EvaluationInputs")),
        "huggingFace": st.none() | st.fixed_dictionaries({"tokenSecret": NAME}, optional={"tokenKey": NAME}),
        "mode": st.sampled_from(["attached", "detached", None]),
        "storage": st.sampled_from(
            [
                {},
                {"existingClaim": "mine"},
                {"kind": "fsx", "size": "4800Gi", "storageClass": "a.b"},
                {"kind": "generic", "size": "3Ti", "storageClass": ""},
                {
                    "kind": "fsx-static",
                    "static": {
                        "fileSystemId": "fs-0123456789abcdef0",
                        "dnsName": "fs-0.fsx.us-west-2.amazonaws.com",
                        "mountName": "fsx",
                    },
                },
            ]
        ),
    }
    if instance == "cpu":
        all_optional["cpu"] = st.fixed_dictionaries({}, optional={"processes": st.integers(1, 128)})
    return {
        "model": draw(HUB_ID | HUB_ID.map(lambda name: f"{name}@1e5") | st.just({"path": "/workspace/models/llama"})),
        "dataset": draw(
            st.fixed_dictionaries(
                {
                    "source": HUB_ID.filter(lambda name: not name.endswith((".json", ".csv", ".txt"))),
                    "format": st.just(format_),
                },
                optional={
                    "columns": st.fixed_dictionaries({}, optional=dict.fromkeys(columns, WORD)),
                    "evalFraction": numbers("DatasetInputs")["evalFraction"],
                    "revision": st.just("v1"),
                },
            )
        ),
        "instance": instance,
        "image": draw(
            st.sampled_from(
                ["repo:5000/llama-lora:1.10", f"a/b@sha256:{'a' * 64}", f"llama-lora:0.1@sha256:{'0' * 64}"]
            )
        ),
        **draw(st.fixed_dictionaries({}, optional=all_optional)),
    }


@given(wanted=right_inputs())
def test_what_genvalues_accepts_the_chart_accepts(wanted: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(dump(wanted))
    values = yaml.safe_load(written(Sources((file,))))  # raises what the chart's schema refuses
    assert not list(chart.refusals(CHART, chart.on_top_of_defaults(CHART, values)))
    layout = values["parallelism"]
    assert layout["nodes"] * layout["processesPerNode"] == layout["tensorParallelSize"] * layout["dataParallelSize"]


def test_what_the_chart_refuses_is_told_by_its_chart_values_key(tmp_path: Path) -> None:
    with pytest.raises(
        Exception, match=r"finetune.yaml:17:32 chartValues.stages.train.backofLimit: unknown key .*backoffLimit"
    ):
        values_of(tmp_path, ISSUE.replace("chartValues: {}", "chartValues: {stages: {train: {backofLimit: 1}}}"))
    with pytest.raises(Exception, match=r"--set chartValues.kueue=5: must be a mapping, not 5"):
        values_of(tmp_path, ISSUE, "chartValues.kueue=5")
    with pytest.raises(Exception, match=r"tolerations\[0\]: must be a mapping, not null"):
        values_of(tmp_path, ISSUE, "chartValues.stages.train.tolerations[1].key=a")


def test_the_charts_schema_is_there_to_be_asked() -> None:
    jsonschema.Draft7Validator.check_schema(json.loads((CHART / "values.schema.json").read_text()))
