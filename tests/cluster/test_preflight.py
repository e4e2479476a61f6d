"""Preflight reports every problem at once, each with a fix, before any stage has a pod."""

from __future__ import annotations

import time
from collections.abc import Callable

from chart.manifests import CHART, Values, merged
from cluster.space import CLAIM, EFA, NEURON, Release, Space, run, stand_in
from genvalues.cluster.objects import COMPONENT, component_of, moment
from genvalues.common.findings import Finding
from genvalues.ops.preflight.cluster_checks import check_cluster

PROMISED_SECONDS = 30
STOPS = stand_in(tokenize="exit 2")
TOKEN: Values = {"huggingFace": {"tokenSecret": "hf-token"}}
OF_TYPE = "node.kubernetes.io/instance-type=ml.trn1.32xlarge"


def findings(release: Release) -> list[str]:
    """What preflight logged: a finding and its fix in one line."""
    log = release.space.log(f"job/{release.name}-preflight")
    return [" ".join(line.split()) for line in log.replace(f"\n{'':<11}  fix: ", " FIX: ").splitlines()]


def problems(release: Release) -> set[str]:
    """The findings that are not ok, without what the command logs (warning: ...) while it waits."""
    return {finding for finding in findings(release) if not finding.startswith(("ok ", "warning: "))}


def look(namespace: str, values: Values) -> list[Finding]:
    """Findings of `genvalues preflight`, within the stage's time limit."""
    began = time.monotonic()
    findings = check_cluster(CHART, values, "llama", namespace, None)
    assert time.monotonic() - began < PROMISED_SECONDS
    return findings


def lines(findings: list[Finding]) -> list[str]:
    return [" ".join(str(finding).replace("\n", " ").replace(" fix: ", " FIX: ").split()) for finding in findings]


def components(space: Space) -> set[str]:
    """The components of all pods of the chart that have existed."""
    return {component_of(pod) for pod in space.history.pods()} - {""}


def check_preflight_stopped(release: Release) -> None:
    """It failed in time and without a retry, and no later stage started."""
    assert release.state == "failed"
    assert components(release.space) == {"cleanup", "preflight"}
    [pod] = release.space.history.pods(**{COMPONENT: "preflight"})
    [container] = pod["status"]["containerStatuses"]
    ended = container["state"]["terminated"]
    assert ended["exitCode"] == 2
    assert moment(ended["finishedAt"]) - moment(pod["status"]["startTime"]) < PROMISED_SECONDS


def test_every_problem_is_reported_at_once_with_a_fix_before_the_install_too_and_no_stage_starts(space: Space) -> None:
    """Preflight mounts neither the claim nor the Secret, so it runs although both are missing. `genvalues preflight`
    reports the same from outside."""
    wrong: Values = {
        "devices": {NEURON: 16, "example.com/few": 2, "example.com/none": 1},
        "storage": {"existingClaim": "nowhere", "prepare": {"enabled": True}},
    }
    values = merged(STOPS, TOKEN, wrong)
    outside = {line for line in lines(look(space.name, values)) if not line.startswith("ok ")}
    assert space.list("pytorchjobs") == [], "the probe is deleted"
    release = space.release()
    ended = release.install(values, status=1)
    check_preflight_stopped(release)
    here = f"kubectl -n {space.name}"
    expected = {
        f"error claim nowhere: PersistentVolumeClaim not found in namespace {space.name} (existing claims: {CLAIM})"
        f" FIX: {here} get pvc # then set storage.existingClaim",
        f"error namespace {space.name}: enforces Pod Security restricted, which rejects the pod of storage-prepare"
        f" because it runs as root FIX: kubectl label namespace {space.name}"
        " pod-security.kubernetes.io/enforce=baseline --overwrite # or, if the stages' user already owns the volume's"
        " root folder, set storage.prepare.enabled: false",
        f"error secret hf-token: Secret not found in namespace {space.name}"
        f" FIX: {here} create secret generic hf-token --from-file=token=/dev/stdin",
        "error nodes ml.trn1.32xlarge: 1 of 1 are ready and schedulable, 2 needed"
        " FIX: kubectl get nodes -L node.kubernetes.io/instance-type",
        "error example.com/few: 2 per node needed on 2 nodes; 0 of 1 have that many (most: 1)"
        f" FIX: kubectl describe nodes -l {OF_TYPE} # then change instance, nodes or devices",
        "error example.com/none: no node of type ml.trn1.32xlarge offers it: its device plugin is not running"
        f" FIX: kubectl get nodes -l {OF_TYPE} -o yaml",
    }
    assert outside == expected
    assert problems(release) == expected | {"6 of 9 findings stop this release; the fixes are above"}
    assert "error        claim nowhere" in ended.output, "Helm prints it"


def test_a_complete_namespace_passes(new_space: Callable[..., Space]) -> None:
    """It allows storage.prepare to run as root, and has the Secret, the claim, the operator and the devices."""
    space = new_space("baseline")
    space.volume.create()
    space.kubectl("create", "secret", "generic", "hf-token", "--from-literal=token=x")
    release = space.release()
    release.install(merged(STOPS, TOKEN, {"storage": {"prepare": {"enabled": True}}}), status=1)
    assert findings(release) == [
        "ok training operator: installed, and reconciles PyTorchJobs",
        f"ok claim {CLAIM}: Bound 1Gi",
        f"ok namespace {space.name}: enforces Pod Security baseline, which allows storage-prepare to run as root",
        "ok secret hf-token: has key token",
        f"ok {NEURON}: 1 on each of 1 nodes of type ml.trn1.32xlarge",
        f"ok {EFA}: 1 on each of 1 nodes of type ml.trn1.32xlarge",
    ]
    assert components(space) == {"cleanup", "preflight", "storage-prepare", "tokenize"}


def test_without_cluster_scoped_reads_nodes_are_not_checked_and_the_install_continues(space: Space) -> None:
    release = space.release(4)
    release.install(
        merged(STOPS, {"rbac": {"clusterScopedReads": False}, "devices": {"example.com/none": 1}}), status=1
    )
    assert problems(release) == {
        f"not checked devices: rbac.clusterScopedReads is false. Check: kubectl get nodes -l {OF_TYPE} -o yaml"
    }
    assert "tokenize" in components(space)
    assert f"/{space.name}." not in kubectl("get", "clusterroles,clusterrolebindings", "-o", "name")


def test_a_cluster_without_a_node_of_the_type_continues_as_an_autoscaler_may_add_one(space: Space) -> None:
    release = space.release()
    release.install(merged(STOPS, {"instance": "ml.trn2.48xlarge"}), status=1)
    [finding] = problems(release)
    assert finding.startswith("warning nodes ml.trn2.48xlarge: none at the moment;") and "autoscaler" in finding
    assert "tokenize" in components(space)


def kubectl(*arguments: str) -> str:
    done = run(["kubectl", *arguments])
    assert done.status == 0, done.output
    return done.output
