"""Which backend trains on which instance type, and the keys of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chart.manifests import CHART
from genvalues.accelerators.instances import NAMES, UNNAMED
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
@pytest.mark.parametrize("beginning", UNNAMED)
def test_an_instance_type_that_aws_has_not_named_is_refused_as_such(
    beginning: str, prefix: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        values_of(tmp_path, f"{prefix}{beginning}.48xlarge")
    (line,) = str(refused.value).splitlines()
    assert " instance: " in line and "not known yet" in line and "trn2.48xlarge" in line
