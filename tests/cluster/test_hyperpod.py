"""SageMaker HyperPod: job auto-resume, and nodes that it reports as healthy."""

from __future__ import annotations

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


def test_without_a_healthy_node_compile_ends_with_the_schedulers_reason_and_with_one_it_runs_with_auto_resume(
    space: Space,
) -> None:
    """Other tests that ask for a healthy node wait meanwhile: their limit is 30 minutes."""
    release = space.release()
    values = merged(stand_in(), AUTO_RESUME)
    with node_labels({HEALTH: None}):
        ended = release.install(merged(values, {"pipeline": {"unschedulableTimeoutSeconds": 5}}), status=1)
    assert_that_hyperpod_resumes(space, "compile")
    waiting = latest(space, "Pod", "compile")
    assert all(unschedulable(pod) and "nodeName" not in pod["spec"] for pod in waiting)
    assert "didn't match Pod's node affinity/selector" in ended.output  # in the gate's log, which Helm prints
    assert latest(space, "Pod", "train") == []

    release.upgrade(values)
    assert len(latest(space, "Pod", "compile")) == len(waiting) + 2
    assert_that_hyperpod_resumes(space, "train")
