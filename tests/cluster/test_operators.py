"""The operator of PyTorchJobs: HyperPod's, and none. (TrainJobs: test_trainer.)"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chart.manifests import Values, merged
from cluster.local import operators
from cluster.space import PATIENCE, Space, is_stage, stand_in, succeeded, uids
from cluster.test_hyperpod import latest
from cluster.test_preflight import STOPS, check_preflight_stopped, kubectl, problems
from cluster.test_training import TRAINING, check_training, put_inputs
from genvalues.cluster.objects import ends_of

pytestmark = pytest.mark.operator
BRIEF: Values = {"evaluation": {"enabled": False}}


@pytest.fixture(scope="module")
def operator_of_hyperpod() -> Iterator[None]:
    """HyperPod's Helm chart installs 1.7.0."""
    try:
        operators.install("1.7")
        yield
    finally:
        operators.install("1.9")


@pytest.mark.repeat
def test_hyperpods_operator_runs_the_pipeline_and_failures_are_reported(
    space: Space, operator_of_hyperpod: None
) -> None:
    runs_the_pipeline_and_reports_failures(space, "pytorchjob")


def runs_the_pipeline_and_reports_failures(space: Space, workload: str) -> None:
    """A failed worker ends the release within 15 s, with its log; after a fix, finished stages are not repeated."""
    release = space.release()
    settings: Values = merged(BRIEF, {"workload": workload, "stages": {"train": {"backoffLimit": 0}}})

    client = release.start_install(merged(stand_in(train="echo my last words; exit 1"), settings))
    space.wait("a worker's status 1", lambda: 1 in statuses(space, "train"))
    ended = client.wait(15)
    assert ended.status == 1 and "ended with status 1" in ended.output and "my last words" in ended.output

    compiled = uids(latest(space, "Pod", "compile"))
    release.upgrade(merged(stand_in(), settings))
    assert uids(latest(space, "Pod", "compile")) == compiled
    assert all(succeeded(job) for job in space.list("jobs", release.instance))
    compile_ended = space.history.first(lambda o: o["kind"] == "Job" and is_stage(o, "compile-gate") and succeeded(o))
    first_pod = space.history.first(lambda o: o["kind"] == "Pod" and is_stage(o, "train"))
    assert compile_ended is not None and first_pod is not None and compile_ended <= first_pod


def statuses(space: Space, stage: str) -> list[int]:
    """Exit statuses of the containers of its pods so far."""
    return [end.code for pod in latest(space, "Pod", stage) for end in ends_of(pod)]


@pytest.mark.repeat
def test_hyperpods_operator_trains_a_small_llama(
    new_space: Callable[..., Space], operator_of_hyperpod: None, tmp_path: Path
) -> None:
    space = new_space()
    put_inputs(space, tmp_path)
    steps = 60
    fewer: Values = {"training": {"maxSteps": steps, "saveSteps": steps, "evalSteps": steps // 3}}
    space.release().install(merged(TRAINING, BRIEF, fewer), seconds=2 * PATIENCE)
    check_training(space.volume, steps, tmp_path)


def test_a_missing_training_operator_stops_the_install_with_a_fix(new_space: Callable[..., Space]) -> None:
    """Once not running, once not installed."""
    not_running = (
        "PyTorchJob is served, but no operator reconciled a test job within 10 s FIX: kubectl -n kubeflow rollout"
    )
    not_installed = "not installed: the API server does not serve PyTorchJob"
    for without_operator, found in [(operator_stopped, not_running), (kind_not_served, not_installed)]:
        space = new_space()
        space.volume.create()
        release = space.release()
        with without_operator(space):
            release.install(STOPS, status=1)
        check_preflight_stopped(release)
        [operator] = problems(release) - {"1 of 5 findings stop this release; the fixes are above"}
        assert operator.startswith(f"error training operator: {found}")


@contextmanager
def operator_stopped(space: Space) -> Iterator[None]:
    operator = ["deployment/training-operator", "--namespace", "kubeflow"]
    kubectl("scale", *operator, "--replicas=0")
    kubectl("wait", "--for=delete", "pod", "--selector=control-plane=kubeflow-training-operator", *operator[1:])
    try:
        yield
    finally:
        kubectl("scale", *operator, "--replicas=1")
        kubectl("rollout", "status", *operator, f"--timeout={PATIENCE:.0f}s")


@contextmanager
def kind_not_served(space: Space) -> Iterator[None]:
    """As in a cluster without the CRD. Deleting the CRD would delete the jobs of all tests."""

    def serve(wish: bool) -> None:
        change = [{"op": "replace", "path": "/spec/versions/0/served", "value": wish}]
        kubectl("patch", "crd", "pytorchjobs.kubeflow.org", "--type=json", "--patch", json.dumps(change))
        space.wait(f"PyTorchJobs served: {wish}", lambda: ("pytorchjobs" in served()) is wish)

    def served() -> set[str]:
        return {kind["name"] for kind in json.loads(kubectl("get", "--raw", "/apis/kubeflow.org/v1"))["resources"]}

    serve(False)
    try:
        yield
    finally:
        serve(True)
