"""Preflight says everything that is wrong at once, each with its fix, before any stage has a pod."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from chart.manifests import Values, merged
from cluster.space import CLAIM, EFA, NEURON, Release, Space, run, stand_in
from genvalues.cluster.objects import COMPONENT, component_of, moment

PROMISED_SECONDS = 30
STOPS = stand_in(tokenize="exit 2")
TOKEN: Values = {"huggingFace": {"tokenSecret": "hf-token"}}
OF_TYPE = "node.kubernetes.io/instance-type=ml.trn1.32xlarge"


def findings(release: Release) -> list[str]:
    """What preflight said: a finding and its fix in one line."""
    log = release.space.log(f"job/{release.name}-preflight")
    return [" ".join(line.split()) for line in log.replace(f"\n{'':<11}  fix: ", " FIX: ").splitlines()]


def problems(release: Release) -> set[str]:
    return {finding for finding in findings(release) if not finding.startswith("ok ")}


def components(space: Space) -> set[str]:
    """Of every pod of the chart there has ever been."""
    return {component_of(pod) for pod in space.history.pods()} - {""}


def check_preflight_stopped(release: Release) -> None:
    """In time, at its first try, and nothing came after it."""
    assert release.state == "failed"
    assert components(release.space) == {"cleanup", "preflight"}
    [pod] = release.space.history.pods(**{COMPONENT: "preflight"})
    [container] = pod["status"]["containerStatuses"]
    ended = container["state"]["terminated"]
    assert ended["exitCode"] == 2
    assert moment(ended["finishedAt"]) - moment(pod["status"]["startTime"]) < PROMISED_SECONDS


def test_everything_that_is_wrong_is_said_at_once_each_with_its_fix_and_no_stage_starts(
    space: Space, helm: int
) -> None:
    """Preflight mounts neither the claim nor the Secret that is missing, so it runs all the same."""
    wrong: Values = {
        "devices": {NEURON: 999, "example.com/none": 1},
        "storage": {"existingClaim": "nowhere", "prepare": {"enabled": True}},
    }
    release = space.release(helm)
    ended = release.install(merged(STOPS, TOKEN, wrong), status=1)
    check_preflight_stopped(release)
    here = f"kubectl -n {space.name}"
    assert problems(release) == {
        f"error claim nowhere: there is no such PersistentVolumeClaim in namespace {space.name} (there is: {CLAIM})"
        f" FIX: {here} get pvc # then storage.existingClaim",
        f"error namespace {space.name}: enforces Pod Security restricted, which refuses the pod of storage-prepare: it"
        f" runs as root FIX: kubectl label namespace {space.name} pod-security.kubernetes.io/enforce=baseline"
        " --overwrite # or, where the volume's root folder is the stages' user's already, storage.prepare.enabled:"
        " false",
        f"error secret hf-token: there is no such Secret in namespace {space.name}"
        f" FIX: {here} create secret generic hf-token --from-literal=token=hf_...",
        "error nodes ml.trn1.32xlarge: 1 of 1 are ready and schedulable, 2 needed"
        " FIX: kubectl get nodes -L node.kubernetes.io/instance-type",
        f"error {NEURON}: 999 a node needed on 2 nodes; 0 of 1 have that, the most is 16"
        f" FIX: kubectl describe nodes -l {OF_TYPE} # then instance, nodes or devices",
        "error example.com/none: no node of type ml.trn1.32xlarge offers it: its device plugin does not run"
        f" FIX: kubectl get nodes -l {OF_TYPE} -o yaml",
        "6 of 8 findings stop this release; the fixes are above",
    }
    assert "error        claim nowhere" in ended.output, "Helm prints it"


def test_a_namespace_that_has_everything_passes(new_space: Callable[..., Space]) -> None:
    """Root for storage.prepare, the Secret, the claim, the operator and the devices."""
    space = new_space("baseline")
    space.volume.create()
    space.kubectl("create", "secret", "generic", "hf-token", "--from-literal=token=x")
    release = space.release()
    release.install(merged(STOPS, TOKEN, {"storage": {"prepare": {"enabled": True}}}), status=1)
    assert findings(release) == [
        "ok training operator: knows PyTorchJob and acts on it",
        f"ok claim {CLAIM}: Bound 1Gi",
        f"ok namespace {space.name}: enforces Pod Security baseline, which lets storage-prepare run as root",
        "ok secret hf-token: has key token",
        f"ok {NEURON}: 8 on each of 1 nodes of type ml.trn1.32xlarge",
        f"ok {EFA}: 4 on each of 1 nodes of type ml.trn1.32xlarge",
    ]
    assert components(space) == {"cleanup", "preflight", "storage-prepare", "tokenize"}


def test_without_cluster_scoped_reads_it_says_not_checked_and_the_install_goes_on(space: Space) -> None:
    release = space.release(4)
    release.install(
        merged(STOPS, {"rbac": {"clusterScopedReads": False}, "devices": {"example.com/none": 1}}), status=1
    )
    assert problems(release) == {
        "not checked devices: cluster-scoped reads are off (clusterScopedReads); look yourself:"
        f" kubectl get nodes -l {OF_TYPE} -o yaml"
    }
    assert "tokenize" in components(space)
    assert f"/{space.name}." not in kubectl("get", "clusterroles,clusterrolebindings", "-o", "name")


@pytest.mark.node
def test_no_training_operator_and_no_device_plugin_stop_the_install_with_their_fixes(
    new_space: Callable[..., Space],
) -> None:
    """Of the operator: a kind that nobody acts on, and a kind that is not there."""
    acts = "the kind PyTorchJob is known, but nobody acted on a test job within 10 s FIX: kubectl -n kubeflow rollout"
    kind = "the API server does not know the kind PyTorchJob FIX: kubectl apply --server-side -k"
    for without_operator, said in [(nobody_acts, acts), (no_such_kind, kind)]:
        space = new_space()
        space.volume.create()
        release = space.release()
        with without_operator(space), no_device_plugin():
            release.install(STOPS, status=1)
        check_preflight_stopped(release)
        device, operator = sorted(problems(release) - {"2 of 5 findings stop this release; the fixes are above"})
        assert operator.startswith(f"error training operator: {said}")
        assert device == (
            f"error {NEURON}: no node of type ml.trn1.32xlarge offers it: its device plugin does not run"
            " FIX: helm upgrade --install neuron-helm-chart oci://public.ecr.aws/neuron/neuron-helm-chart"
        )


@contextmanager
def nobody_acts(space: Space) -> Iterator[None]:
    operator = ["deployment/training-operator", "--namespace", "kubeflow"]
    kubectl("scale", *operator, "--replicas=0")
    kubectl("wait", "--for=delete", "pod", "--selector=control-plane=kubeflow-training-operator", *operator[1:])
    try:
        yield
    finally:
        kubectl("scale", *operator, "--replicas=1")
        kubectl("rollout", "status", *operator, "--timeout=120s")


@contextmanager
def no_such_kind(space: Space) -> Iterator[None]:
    """As a cluster without its CRD; deleting that would delete everybody's jobs."""

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


@contextmanager
def no_device_plugin() -> Iterator[None]:
    """The kubelet reports 0 of a resource whose plugin has gone."""
    [node] = kubectl("get", "nodes", "-o", "name").split()

    def offer(count: int) -> None:
        offered = {NEURON: str(count)}
        change = {"status": {"capacity": offered, "allocatable": offered}}
        kubectl("patch", node, "--subresource=status", "--patch", json.dumps(change))

    offer(0)
    try:
        yield
    finally:
        offer(16)


def kubectl(*arguments: str) -> str:
    done = run(["kubectl", *arguments])
    assert done.status == 0, done.output
    return done.output
