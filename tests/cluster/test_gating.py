"""Each stage waits for the previous one, with the stages and backend of each instance type.

The order of a TrainJob's pipeline: test_rbac.
"""

from __future__ import annotations

import pytest
import yaml

from chart.manifests import ROOT, Values, merged
from cluster.local import node
from cluster.space import (
    EFA,
    NEURON,
    RESOURCES,
    SMALL,
    STAND_IN_IMAGE,
    Space,
    image,
    node_labels,
    stages_in_order,
)
from genvalues.cluster.objects import COMPONENT


@pytest.mark.parametrize(
    ("environment", "backend"), [("trn1", "xla"), pytest.param("trn2", "native", marks=pytest.mark.node)]
)
def test_the_values_of_an_instance_type_install_with_its_backend(space: Space, environment: str, backend: str) -> None:
    written = yaml.safe_load((ROOT / "values" / f"{environment}.values.yaml").read_text(encoding="utf-8"))
    small: Values = {"resources": RESOURCES}
    here: Values = {
        "devices": {NEURON: 1, EFA: 1},
        "parallelism": {
            **dict.fromkeys(["processesPerNode", "tensorParallelSize", "dataParallelSize"]),
            "shardSize": 1,
        },
        "storage": SMALL["storage"],
        "huggingFace": {"tokenSecret": ""},
        "pipeline": {"mode": "attached"},
        "sharedMemory": "64Mi",
        "stageDefaults": small,
        "stages": dict.fromkeys(written["stages"], small),
    }
    other_type = written["instance"] != node.INSTANCE_TYPE
    with node_labels({node.INSTANCE_LABEL: written["instance"]} if other_type else {}):
        space.release().install(merged(written, image(STAND_IN_IMAGE), here))
    stages_in_order(space.history)
    assert len(space.history.pods(**{COMPONENT: "rehearse"})) == 1
    runs = [yaml.safe_load(each["data"]["run.yaml"]) for each in space.list("configmaps") if "run.yaml" in each["data"]]
    assert [(run["backend"], run["device"]) for run in runs] == [(backend, "neuron")]
