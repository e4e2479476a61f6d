"""Each stage waits for the previous one, with the stages and backend of each instance type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from chart.manifests import ROOT, Values, merged
from cluster.local import node
from cluster.space import EFA, NEURON, RESOURCES, SMALL, STAND_IN_IMAGE, Space, image, stages_in_order, stand_in
from cluster.test_hyperpod import HEALTH, HEALTHY
from genvalues.cluster.objects import COMPONENT

INSTANCE_LABEL = "node.kubernetes.io/instance-type"


def test_no_pod_of_a_stage_exists_before_the_previous_stage_has_succeeded(space: Space, helm: int) -> None:
    space.release(helm).install(stand_in(tokenize="sleep 2", compile="sleep 2", train="sleep 2"))
    stages_in_order(space.history)


@contextmanager
def labels(space: Space, wanted: dict[str, str]) -> Iterator[None]:
    """Give the node these labels for a while."""
    label = ["label", "node", node.NODE, "--overwrite"]
    space.kubectl(*label, *(f"{key}={value}" for key, value in wanted.items()))
    try:
        yield
    finally:
        space.kubectl(*label, f"{INSTANCE_LABEL}={node.INSTANCE_TYPE}", f"{HEALTH}-")


@pytest.mark.node
@pytest.mark.parametrize(("environment", "backend"), [("trn1", "xla"), ("trn2", "native")])
def test_the_values_of_an_instance_type_install_with_its_backend(space: Space, environment: str, backend: str) -> None:
    written = yaml.safe_load((ROOT / "values" / f"{environment}.values.yaml").read_text(encoding="utf-8"))
    small: Values = {"resources": RESOURCES}
    here: Values = {
        "devices": {NEURON: 8, EFA: 4},  # of a node that has as many as a trn1.32xlarge
        "storage": SMALL["storage"],
        "huggingFace": {"tokenSecret": ""},
        "pipeline": {"mode": "attached"},
        "sharedMemory": "64Mi",
        "stageDefaults": small,
        "stages": dict.fromkeys(written["stages"], small),
    }
    with labels(space, {INSTANCE_LABEL: written["instance"], HEALTH: HEALTHY}):
        space.release().install(merged(written, image(STAND_IN_IMAGE), here))
    stages_in_order(space.history)
    assert len(space.history.pods(**{COMPONENT: "rehearse"})) == 1
    runs = [yaml.safe_load(each["data"]["run.yaml"]) for each in space.list("configmaps") if "run.yaml" in each["data"]]
    assert [(run["backend"], run["device"]) for run in runs] == [(backend, "neuron")]
