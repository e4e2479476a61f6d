"""SageMaker HyperPod: job auto-resume, nodes that it reports as healthy, and its training operator 1.8.1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chart.manifests import Object, Values, merged
from cluster.local import node, operators
from cluster.space import Space, is_stage, stand_in, succeeded, uids
from genvalues.cluster.objects import annotations_of, ends_of, unschedulable

HEALTH, HEALTHY = "sagemaker.amazonaws.com/node-health-status", "Schedulable"
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


def test_without_a_healthy_node_compile_waits_and_ends_with_the_schedulers_reason(space: Space) -> None:
    release = space.release()
    values = merged(stand_in(), AUTO_RESUME, {"pipeline": {"unschedulableTimeoutSeconds": 5}})
    ended = release.install(values, status=1)
    assert_that_hyperpod_resumes(space, "compile")
    assert all(unschedulable(pod) and "nodeName" not in pod["spec"] for pod in latest(space, "Pod", "compile"))
    assert "didn't match Pod's node affinity/selector" in ended.output  # in the gate's log, which Helm prints
    assert latest(space, "Pod", "train") == []


@pytest.mark.node
def test_on_healthy_nodes_compile_and_train_run_with_auto_resume(space: Space) -> None:
    label = ["label", "node", node.NODE, "--overwrite"]
    space.kubectl(*label, f"{HEALTH}={HEALTHY}")
    try:
        space.release().install(merged(stand_in(), AUTO_RESUME))
    finally:
        space.kubectl(*label, f"{HEALTH}-")
    for stage in ("compile", "train"):
        assert_that_hyperpod_resumes(space, stage)


@pytest.fixture
def operator_1_8() -> Iterator[None]:
    """Install the newest training operator that AWS supports on HyperPod, for one test."""
    try:
        operators.install("1.8")
        yield
    finally:
        operators.install("1.9")


@pytest.mark.node
@pytest.mark.usefixtures("operator_1_8")
def test_hyperpods_operator_runs_the_pipeline_and_failures_are_reported(space: Space) -> None:
    """A failed worker ends the release within 15 s, with its log; after a fix, finished stages are not repeated."""
    release = space.release()

    def values(train: str) -> Values:
        once: Values = {"stages": {"train": {"backoffLimit": 0}}, "evaluation": {"enabled": False}}
        return merged(stand_in(train=train), once)

    for status, start in ((2, release.start_install), (1, release.start_upgrade)):
        client = start(values(f"echo my last words; exit {status}"))
        space.wait(f"a worker's status {status}", lambda seen=status: seen in statuses(space, "train"), 180)
        ended = client.wait(15)
        assert ended.status == 1 and f"ended with status {status}" in ended.output and "my last words" in ended.output

    compiled = uids(latest(space, "Pod", "compile"))
    release.upgrade(values("true"))
    assert uids(latest(space, "Pod", "compile")) == compiled
    assert all(succeeded(job) for job in space.list("jobs"))
    compile_ended = space.history.first(lambda o: o["kind"] == "Job" and is_stage(o, "compile-gate") and succeeded(o))
    first_pod = space.history.first(lambda o: o["kind"] == "Pod" and is_stage(o, "train"))
    assert compile_ended is not None and first_pod is not None and compile_ended <= first_pod


def statuses(space: Space, stage: str) -> list[int]:
    """Exit statuses of the containers of its pods so far."""
    return [end.code for pod in latest(space, "Pod", stage) for end in ends_of(pod)]
