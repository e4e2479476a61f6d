"""SageMaker HyperPod: job auto-resume, and nodes that it reports as healthy."""

from __future__ import annotations

import pytest

from chart.manifests import Object, Values, merged
from cluster.local.node import HEALTH, HEALTHY
from cluster.space import Space, is_stage, node_labels, stand_in
from genvalues.cluster.objects import annotations_of, unschedulable

AUTO_RESUME: Values = {"hyperpod": {"autoResume": True, "maxRetries": 3}, "evaluation": {"enabled": False}}


def assert_that_hyperpod_resumes(space: Space, stage: str) -> None:
    """As far as the objects show it."""
    [job] = latest(space, "PyTorchJob", stage)
    annotations = annotations_of(job)
    assert annotations["sagemaker.amazonaws.com/enable-job-auto-resume"] == "true"
    assert annotations["sagemaker.amazonaws.com/job-max-retry-count"] == "3"
    [worker] = job["spec"]["pytorchReplicaSpecs"].values()
    assert worker["restartPolicy"] == "OnFailure"
    pods = latest(space, "Pod", stage)
    assert len(pods) == 2
    for pod in pods:
        assert pod["spec"]["nodeSelector"][HEALTH] == HEALTHY
        assert pod["spec"]["restartPolicy"] == "OnFailure"


def latest(space: Space, kind: str, stage: str) -> list[Object]:
    found = [one.item for one in space.history.sightings if one.item.get("kind") == kind and is_stage(one.item, stage)]
    return list({item["metadata"]["uid"]: item for item in found}.values())


@pytest.mark.node
def test_without_a_healthy_node_compile_waits_and_ends_with_the_schedulers_reason(space: Space) -> None:
    release = space.release()
    values = merged(stand_in(), AUTO_RESUME, {"pipeline": {"unschedulableTimeoutSeconds": 5}})
    with node_labels({HEALTH: None}):
        ended = release.install(values, status=1)
    assert_that_hyperpod_resumes(space, "compile")
    assert all(unschedulable(pod) and "nodeName" not in pod["spec"] for pod in latest(space, "Pod", "compile"))
    assert "didn't match Pod's node affinity/selector" in ended.output  # in the gate's log, which Helm prints
    assert latest(space, "Pod", "train") == []


def test_on_healthy_nodes_compile_and_train_run_with_auto_resume(space: Space) -> None:
    space.release().install(merged(stand_in(), AUTO_RESUME))
    for stage in ("compile", "train"):
        assert_that_hyperpod_resumes(space, stage)
