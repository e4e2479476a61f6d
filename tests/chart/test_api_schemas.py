"""Every object is valid for the API server, by the schemas of Kubernetes and the training operator's CRD."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from chart.manifests import CHART, MINIMAL, Object, merged, one, pods, render

OLDEST = "1.28"  # Chart.yaml: kubeVersion
NEWEST = "1.34"
OPERATORS = ["1.8.1", "1.9.3"]
TRAINERS = ["2.0.0", "2.2.0"]
CUSTOM = {"PyTorchJob": OPERATORS, "TrainJob": TRAINERS, "TrainingRuntime": TRAINERS}  # versions

# The validator would read its files (2 MB) again for each object.
kubernetes_validate.utils.schema_contents = lru_cache(maxsize=64)(kubernetes_validate.utils.schema_contents)


@cache
def check_builtin(text: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(text), version, strict=True)


@cache
def validator(kind: str, version: str) -> jsonschema.Draft7Validator:
    schema = json.loads((Path(__file__).parent / f"schemas/{kind.lower()}-{version}.json").read_text())
    return jsonschema.Draft7Validator(strict(schema))


def strict(schema: Any) -> Any:
    """Rejects unknown fields, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        result["additionalProperties"] = False
    return result


@cache
def check_custom(text: str, version: str) -> None:
    item = json.loads(text)
    validator(item["kind"], version).validate(item)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_are_valid_for_kubernetes(objects: list[Object], version: str) -> None:
    for item in objects:
        if item["kind"] not in CUSTOM:
            check_builtin(json.dumps(item), version)


def test_custom_resources_are_valid_for_every_supported_operator(objects: list[Object]) -> None:
    for item in objects:
        for version in CUSTOM.get(item["kind"], []):
            check_custom(json.dumps(item), version)


def test_worker_pods_are_valid_for_kubernetes(objects: list[Object]) -> None:
    for each in pods(objects):
        if each.trains:
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": each.template}
            check_builtin(json.dumps(template), NEWEST)


def test_an_unknown_field_is_rejected() -> None:
    job = json.loads(json.dumps(one(render(MINIMAL), "Job", "llama-merge")))
    job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFileSystem"):
        check_builtin(json.dumps(job), NEWEST)
    train = json.loads(json.dumps(one(render(MINIMAL), "PyTorchJob", "llama-train-1")))
    for where, key in [(train["spec"], "nProcPerNode"), (train["spec"]["runPolicy"], "suspended")]:
        where[key] = "1"
        with pytest.raises(jsonschema.ValidationError, match=key):
            check_custom(json.dumps(train), "1.9.3")
        del where[key]
    train["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        check_custom(json.dumps(train), "1.8.1")


def test_kube_version_accepts_the_oldest_tested_version(helm: int) -> None:
    metadata = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert metadata["kubeVersion"] == f">={OLDEST}.0-0"


def test_a_pytorchjobs_container_may_set_everything_a_stage_may() -> None:
    settings = {"stageDefaults": {"extraVolumes": {"data": {"csi": {"driver": "a.b"}}}, "podLabels": {"a": "b"}}}
    for version in OPERATORS:
        check_custom(json.dumps(one(render(merged(MINIMAL, settings)), "PyTorchJob", "llama-train-1")), version)
