"""Files and addresses that are something else than meant, settings that are probably slips, and errors for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.manifests import CHART, VALUES_FILES, config, render
from forked import genvalues
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked

CPU = "model: gpt2\ndataset: {source: a/b, format: text}\ninstance: cpu\n"
TRAINIUM = "model: gpt2\ndataset: {source: a/b, format: text}\ninstance: trn1.32xlarge\nimage: a/b:1\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "finetune.yaml"
    file.write_text(text)
    return file


def told(folder: Path, text: str, *sets: str) -> str:
    with pytest.raises(UserError) as found:
        checked(Sources((written(folder, text),), sets, CHART))
    return str(found.value)


@pytest.mark.parametrize("text", [CPU, TRAINIUM])
@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("https://huggingface.co/datasets/org/rows", "Write org/rows."),
        ("https://huggingface.co/datasets/org/rows/tree/main/data", "Write org/rows."),
        ("HTTPS://example.com/rows.jsonl", "Copy the file to S3"),
        ("http://example.com/", "Copy the file to S3"),
    ],
)
def test_a_web_address_is_no_dataset(text: str, source: str, fix: str, tmp_path: Path) -> None:
    line = told(tmp_path, text.replace("a/b, format", f"'{source}', format"))
    assert line.count("\n") == 0
    assert " dataset.source: " in line and "web address" in line and fix in line and "machine" not in line


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ("https://huggingface.co/meta-llama/Llama-3.1-8B/tree/main", "model", "write meta-llama/Llama-3.1-8B"),
        ("https://example.com/model", "model", "web address"),
        ("{path: 'https://hf.co/org/model'}", "model.path", "Write org/model."),
    ],
)
@pytest.mark.parametrize("text", [CPU, TRAINIUM])
def test_a_web_address_is_no_model(model: str, key: str, words: str, text: str, tmp_path: Path) -> None:
    line = told(tmp_path, text.replace("gpt2", model))
    assert f" {key}: " in line and "web address" in line and words in line and "machine" not in line


@pytest.mark.parametrize("bucket", ["My_Bucket", "ab", "-bucket", "UPPER", ""])
def test_the_bucket_is_named_where_its_name_is_wrong(bucket: str, tmp_path: Path) -> None:
    line = told(tmp_path, TRAINIUM.replace("a/b, format", f"'s3://{bucket}/rows.jsonl', format"))
    assert (
        " dataset.source: " in line and f'"{bucket}" is not a valid name of a bucket' in line and "lower-case" in line
    )
    line = told(tmp_path, TRAINIUM + f"publish: {{s3: {{uri: 's3://{bucket}/x'}}}}\n")
    assert " publish.s3.uri: " in line and f'"{bucket}" is not a valid name of a bucket' in line


@pytest.mark.parametrize("path", VALUES_FILES, ids=lambda path: path.name)
def test_a_values_file_is_recognized(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    if not {"image", "devices"} & values.keys() and "id" not in values["model"]:
        pytest.skip("has only keys that both have")
    line = told(tmp_path, path.read_text())
    assert line.count("\n") == 0 and "values file of the chart" in line and "helm template" in line


@pytest.mark.parametrize("more", ["devices: {}\n", "stages: {}\n", "parallelism: {nodes: 2}\n"])
def test_an_inputs_file_with_a_key_of_the_values_is_an_inputs_file(more: str, tmp_path: Path) -> None:
    assert "unknown key" in told(tmp_path, TRAINIUM + more)
    path = CPU.replace("gpt2", "{path: /workspace/a}")
    assert checked(Sources((written(tmp_path, path),), (), CHART)).values["model"]["path"] == "/workspace/a"


@pytest.mark.parametrize(
    ("sets", "key", "usual"),
    [
        ("training.learningRate=0.5", "training.learningRate", "1e-5 to 1e-3"),
        ("training.learningRate=1e-9", "training.learningRate", "1e-5 to 1e-3"),
        ("lora.r=1000", "lora.r", "8 to 256"),
    ],
)
def test_a_probable_slip_warns_and_does_not_refuse(sets: str, key: str, usual: str, tmp_path: Path) -> None:
    found: list[UserError] = []
    assert checked(Sources((written(tmp_path, CPU),), (sets,), CHART), warn=found.append).values
    (warning,) = found
    assert key in warning.where and usual in warning.what


@pytest.mark.parametrize("sets", ["training.learningRate=1e-3,lora.r=256", "training.learningRate=1e-6,lora.r=1"])
def test_usual_values_do_not_warn(sets: str, tmp_path: Path) -> None:
    found: list[UserError] = []
    checked(Sources((written(tmp_path, CPU),), tuple(sets.split(",")), CHART), warn=found.append)
    assert found == []


def test_queues_and_the_workload_are_keys_of_the_inputs(tmp_path: Path) -> None:
    more = "kueue: {queueName: research, cpuQueueName: cpus, priorityClass: high}\nworkload: trainjob\n"
    values = checked(Sources((written(tmp_path, TRAINIUM + more),), (), CHART)).values
    assert values["kueue"] == {"queueName": "research", "cpuQueueName": "cpus", "priorityClass": "high"}
    assert values["workload"] == "trainjob"
    assert (
        config(render({**values, "pipeline": {"mode": "attached"}}), "cluster.yaml")["job"]["queueName"] == "research"
    )
    on_hyperpod = TRAINIUM.replace("trn1", "ml.trn1") + more
    assert not checked(Sources((written(tmp_path, on_hyperpod),), (), CHART)).values["hyperpod"]["autoResume"]
    least = checked(Sources((written(tmp_path, TRAINIUM),), (), CHART)).values
    assert not {"kueue", "workload"} & least.keys()
    under = checked(Sources((written(tmp_path, TRAINIUM),), ("chartValues.kueue.queueName=a",), CHART)).values
    assert under["kueue"] == {"queueName": "a"}, "as before kueue was a key of its own"


def as_json(folder: Path, text: str, *options: str) -> tuple[int, Any, str]:
    written(folder, text)
    done = genvalues("check", "finetune.yaml", "--json", *options, cwd=folder)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_errors_for_programs_have_key_line_message_and_fix(tmp_path: Path) -> None:
    status, document, stderr = as_json(tmp_path, CPU + "lora: {rank: 8}\ntraining:\n  epochs: no\n", "--set", "nodes=0")
    assert (status, document["exitStatus"], stderr) == (2, 2, "")
    assert [set(each) for each in document["findings"]] == [
        {"level", "key", "where", "line", "message", "fix"},
    ] * 3
    found = [(each["level"], each["key"], each["line"]) for each in document["findings"]]
    assert found == [("error", "lora.rank", 4), ("error", "training.epochs", 6), ("error", "nodes", None)]
    first = document["findings"][0]
    assert (first["message"], first["where"]) == ("unknown key", "finetune.yaml:4:8 lora.rank")
    assert "lora.r?" in first["fix"]


def test_warnings_for_programs_do_not_fail(tmp_path: Path) -> None:
    status, document, stderr = as_json(tmp_path, CPU + "lora:\n  r: 1000\n")
    assert (status, stderr) == (0, "")
    assert document["exitStatus"] == 0
    (found,) = document["findings"]
    assert (found["level"], found["key"], found["line"]) == ("warning", "lora.r", 5)


def test_no_problems_are_an_empty_list(tmp_path: Path) -> None:
    assert as_json(tmp_path, CPU) == (0, {"findings": [], "exitStatus": 0}, "")


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    done = genvalues("check", "none.yaml", "--json", cwd=tmp_path)
    (found,) = json.loads(done.stdout)["findings"]
    assert done.returncode == 2 and found["where"] == "none.yaml" and found["line"] is None
