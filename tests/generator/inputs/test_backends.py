"""Which backend trains on which instance type, and the keys of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chart.manifests import CHART
from genvalues.accelerators.instances import NAMES
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked

LEAST = "model: meta-llama/Llama-3.1-8B\ndataset: {source: a/b, format: text}\ninstance: %s\nimage: a/b:1\n"


def values_of(folder: Path, instance: str, *sets: str) -> dict[str, Any]:
    file = folder / "finetune.yaml"
    file.write_text(LEAST % instance)
    values: dict[str, Any] = checked(Sources((file,), sets, CHART)).values
    return values


@pytest.mark.parametrize("instance", NAMES)
def test_the_instance_type_chooses_the_backend_and_whether_to_rehearse(instance: str, tmp_path: Path) -> None:
    values = values_of(tmp_path, instance)
    assert values["backend"] == ("xla" if "trn1" in instance else "native")
    assert values["rehearse"] == {"enabled": instance != "cpu"}


@pytest.mark.parametrize(
    ("instance", "sets", "key", "found"),
    [
        ("trn2.48xlarge", "backend=xla", "backend", "xla"),
        ("ml.trn2.3xlarge", "backend=neuron", "backend", "xla"),
        ("trn1.32xlarge", "backend=neuron", "backend", "xla"),
        ("cpu", "backend=cpu", "backend", "native"),
        ("cpu", "training.attention=flash", "training.attention", "causal"),
        ("cpu", "chartValues.training.attention=flash", "training.attention", "causal"),
        ("trn2.48xlarge", "training.attention=eager", "training.attention", "isolated"),
        ("trn2.48xlarge", "compile.mode=off", "compile.mode", "off"),
        ("trn2.48xlarge", "compile.onFallback=warn", "compile.onFallback", "warn"),
        ("trn2.48xlarge", "rehearse.enabled=false", "rehearse.enabled", False),
        ("cpu", "rehearse.enabled=true", "rehearse.enabled", True),
    ],
)
def test_the_inputs_override_it_in_present_and_older_words(
    instance: str, sets: str, key: str, found: object, tmp_path: Path
) -> None:
    value: Any = values_of(tmp_path, instance, sets)
    for part in key.split("."):
        value = value[part]
    assert value == found


@pytest.mark.parametrize(
    ("instance", "sets", "what", "fix"),
    [
        ("trn1.32xlarge", "backend=native", "Trn2 or later", "xla"),
        ("ml.trn1n.32xlarge", "backend=cpu", "Trn2 or later", "xla"),
        ("cpu", "backend=xla", "requires a Trainium instance", "native"),
        ("cpu", "backend=neuron", "requires a Trainium instance", "native"),
        ("trn1.32xlarge", "parallelism.shardSize=2", "backend native", "1"),
        ("cpu", "chartValues.parallelism.shardSize=3", "does not divide dataParallelSize", "divisor"),
        ("trn2.48xlarge", "chartValues.parallelism.shardSize=8", "process groups", "1, 4, 16 or 64"),
        ("trn1.32xlarge", "compile.mode=off", "backend native", "layers"),
        ("trn1.32xlarge", "compile.onFallback=warn", "backend native", "refuse"),
        ("trn2.48xlarge", "compile.runsOn=cpu", "backend xla", "accelerator"),
        ("trn2.48xlarge", "training.maxSequenceLength=1000", "multiple of 512", "512 or 1024"),
        ("trn1.32xlarge", "lora.targetModules={up_proj}", "gate_proj", "gate_proj"),
    ],
)
def test_what_the_backend_cannot_do_is_a_mistake_with_its_fix(
    instance: str, sets: str, what: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        values_of(tmp_path, instance, sets)
    (line,) = str(refused.value).splitlines()
    found, _, instead = line.removeprefix(f"--set {sets}: ").partition(". ")
    assert line.startswith(f"--set {sets}: ") and what in found and fix in instead


def test_backend_native_trains_gate_and_up_alone_and_any_length_on_a_cpu(tmp_path: Path) -> None:
    assert values_of(tmp_path, "trn2.48xlarge", "lora.targetModules={up_proj}")["lora"]["targetModules"] == ["up_proj"]
    assert values_of(tmp_path, "cpu", "training.maxSequenceLength=1000", "training.attention=causal")


@pytest.mark.parametrize("prefix", ["", "ml."])
@pytest.mark.parametrize(
    "name",
    ["trn3.48xlarge", "trn3pds.3xlarge", "inf2.xlarge", "p4d.24xlarge", "p5.48xlarge", "g5.xlarge", "p6-b200.48xlarge"],
)
def test_other_accelerators_are_refused_as_such(name: str, prefix: str, tmp_path: Path) -> None:
    line = refused(tmp_path, f"{prefix}{name}")
    assert " instance: " in line and "not supported: Trainium 1 and 2" in line and "Trainium 3 when" in line
    assert f"{prefix}trn2.48xlarge" in line and "Did you mean" not in line


@pytest.mark.parametrize(
    ("name", "words", "use"),
    [
        ("ml.trn1.2xlarge", "not an instance type of SageMaker HyperPod", "Use one of ml.trn1.32xlarge"),
        ("ml.trn2u.48xlarge", "not an instance type of SageMaker HyperPod", "ml.trn2.48xlarge"),
        ("trn1.16xlarge", "not an instance type of AWS", "trn1.32xlarge"),
        ("ml.trn2.24xlarge", "not an instance type of AWS", "ml.trn2.48xlarge"),
    ],
)
def test_names_that_aws_does_not_have_are_refused_with_those_of_the_service(
    name: str, words: str, use: str, tmp_path: Path
) -> None:
    line = refused(tmp_path, name)
    assert words in line and use in line
    if name.startswith("ml."):
        assert " trn1" not in line and " trn2" not in line


def test_auto_resume_outside_hyperpod_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        values_of(tmp_path, "trn1.32xlarge", "chartValues.hyperpod.autoResume=true")
    assert "chartValues.hyperpod.autoResume" in str(found.value)
    assert values_of(tmp_path, "ml.trn1.32xlarge")["hyperpod"]["autoResume"] is True
    assert values_of(tmp_path, "trn1.32xlarge")["hyperpod"]["autoResume"] is False


def refused(folder: Path, instance: str) -> str:
    """The one line that refuses an instance type."""
    with pytest.raises(UserError) as found:
        values_of(folder, instance)
    (line,) = str(found.value).splitlines()
    return line
