"""Each stage waits for the previous one, with the stages and backend of each instance type.

The order of a TrainJob's pipeline: test_rbac.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from chart.manifests import CHART, ROOT, Values, merged
from cluster.local import node
from cluster.space import (
    EFA,
    NEURON,
    RESOURCES,
    SMALL,
    STAND_IN_IMAGE,
    STORAGE_CLASS,
    Space,
    image,
    stages_in_order,
)
from genvalues.cluster.objects import COMPONENT

# What this node does not have: a trn1.32xlarge's devices for each test, its cores and memory.
FITS: Values = {
    **image(STAND_IN_IMAGE),
    "devices": {NEURON: 1, EFA: 1},
    "parallelism": {**dict.fromkeys(["processesPerNode", "tensorParallelSize", "dataParallelSize"]), "shardSize": 1},
    "sharedMemory": "64Mi",
    "stageDefaults": {"resources": RESOURCES},
    "stages": {**SMALL["stages"], "rehearse": {"resources": RESOURCES}},
}


def backends(space: Space) -> set[tuple[str, str]]:
    configs = [item["data"]["run.yaml"] for item in space.list("configmaps") if "run.yaml" in item["data"]]
    return {(run["backend"], run["device"]) for run in map(yaml.safe_load, configs)}


@pytest.mark.parametrize(("environment", "backend"), [("trn1", "xla"), ("trn2", "native")])
def test_the_values_of_an_instance_type_install_with_its_backend(space: Space, environment: str, backend: str) -> None:
    """On a node of another type, which the pods of trn2 therefore select."""
    written = yaml.safe_load((ROOT / "values" / f"{environment}.values.yaml").read_text(encoding="utf-8"))
    on_this_node = {"nodeSelector": {node.INSTANCE_LABEL: node.INSTANCE_TYPE}}
    here: Values = {
        "storage": SMALL["storage"],
        "huggingFace": {"tokenSecret": ""},
        "pipeline": {"mode": "attached"},
        "stages": {"compile": on_this_node, "train": on_this_node},
    }
    space.release().install(merged(written, FITS, here))
    stages_in_order(space.history)
    assert len(space.history.pods(**{COMPONENT: "rehearse"})) == 1
    assert backends(space) == {(backend, "neuron")}


def test_the_eight_lines_of_the_charts_readme_install_and_reach_the_gated_training(
    new_space: Callable[..., Space],
) -> None:
    """But for the image, the storage class, and what this node does not have."""
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("```yaml\n")[2].partition("```")[0]
    assert len(lines.splitlines()) == 8
    space = new_space("baseline")  # storage-prepare runs as root
    space.kubectl("create", "secret", "generic", "hf-token", "--from-literal=token=x")
    here: Values = {
        "storage": {"storageClass": STORAGE_CLASS},
        "stages": {"train": {"extraEnv": {"STAND_IN": "echo training; sleep 600"}}},
    }
    space.release(4).install(merged(yaml.safe_load(lines), FITS, here))
    [worker] = space.wait_for_training("llama-run", workers=1)
    assert worker["spec"]["nodeSelector"] == {node.INSTANCE_LABEL: node.INSTANCE_TYPE}
    assert "released PyTorchJob llama-run-train-1" in space.log("job/llama-run-train-gate")
    assert backends(space) == {("xla", "neuron")}
