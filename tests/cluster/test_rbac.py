"""The service accounts' permissions, as the API server decides, and which pods hold devices and tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kubernetes import client

from chart.manifests import Values, merged, render
from chart.test_security import documented
from cluster.space import EFA, NEURON, SMALL, Space, holds, stages_in_order, stand_in
from genvalues.cluster.helm_records import names_in_secrets
from genvalues.cluster.objects import component_of, name_of

CALL_THE_API = {"preflight", "compile-gate", "train-gate", "cleanup"}
NEEDS: dict[str, dict[str, list[str]]] = {
    "attached": {
        "llama-preflight": ["preflight"],
        "llama-gate": ["gate"],
        "llama-cleanup": ["cleanup"],
        "llama-tokenize": [],
        "llama-publish": [],
        "llama-stage": [],
    },
    "detached": {
        "llama-preflight": ["preflight"],
        "llama-gate": ["gate"],
        "llama-cleanup": ["cleanup", "uninstall"],
        "llama-runner": ["runner", "upgrade"],
        "llama-tokenize": [],
        "llama-publish": [],
        "llama-stage": [],
    },
}
EVERY_RULE: Values = {
    "huggingFace": {"tokenSecret": "hf-token"},
    "kueue": {"queueName": "research"},
    "storage": {"prepare": {"enabled": True}},
    "publish": {"s3": {"uri": "s3://bucket/runs/one"}},
}
# The only names allowed where the table in genvalues/cluster/__init__.py says resourceNames.
NAMES = {"secrets": "hf-token", "localqueues.kueue.x-k8s.io": "research"}
CLUSTER_WIDE = {
    *("nodes", "storageclasses.storage.k8s.io"),
    *("clusterqueues.kueue.x-k8s.io", "workloadpriorityclasses.kueue.x-k8s.io"),
}

# Not allowed unless a command needs it: verb, resource as kubectl names it, name, namespace ("": all, None: its own).
DENIED: list[tuple[str, str, str, str | None]] = [
    ("create", "pods", "", None),
    ("delete", "pods", "", None),
    ("patch", "pods", "", None),
    ("create", "pods/exec", "", None),
    ("get", "pods/exec", "", None),
    ("create", "pods/attach", "", None),
    ("create", "pods/portforward", "", None),
    ("create", "pods/eviction", "", None),
    ("patch", "pods/ephemeralcontainers", "", None),
    ("create", "deployments.apps", "", None),
    ("create", "cronjobs.batch", "", None),
    ("delete", "persistentvolumeclaims", "", None),
    ("patch", "persistentvolumeclaims", "", None),
    ("create", "serviceaccounts", "", None),
    ("create", "serviceaccounts/token", "", None),
    ("impersonate", "serviceaccounts", "", None),
    ("impersonate", "users", "", ""),
    ("impersonate", "groups", "", ""),
    ("create", "roles.rbac.authorization.k8s.io", "", None),
    ("bind", "roles.rbac.authorization.k8s.io", "", None),
    ("escalate", "roles.rbac.authorization.k8s.io", "", None),
    ("create", "rolebindings.rbac.authorization.k8s.io", "", None),
    ("get", "clusterroles.rbac.authorization.k8s.io", "", ""),
    ("create", "clusterroles.rbac.authorization.k8s.io", "", ""),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io", "", ""),
    ("patch", "nodes", "", ""),
    ("delete", "nodes", "", ""),
    ("get", "nodes/proxy", "", ""),
    ("list", "namespaces", "", ""),
    ("delete", "namespaces", "", None),
    ("create", "persistentvolumes", "", ""),
    ("delete", "customresourcedefinitions.apiextensions.k8s.io", "", ""),
    ("list", "secrets", "", ""),
    ("list", "secrets", "", None),
    ("get", "secrets", "hf-token", None),
    ("get", "secrets", "sh.helm.release.v1.llama.v1", None),
    ("list", "secrets", "", "kube-system"),
    ("get", "secrets", "hf-token", "kube-system"),
    ("list", "pods", "", ""),
    ("create", "jobs.batch", "", "kube-system"),
]


def user(space: Space, account: str) -> str:
    return f"system:serviceaccount:{space.name}:{account}"


def may(space: Space, account: str, verb: str, resource: str, name: str = "", namespace: str | None = None) -> bool:
    """The API server's answer to a SubjectAccessReview."""
    kind, _, group = resource.partition(".")
    kind, _, subresource = kind.partition("/")
    everyone = ["system:serviceaccounts", f"system:serviceaccounts:{space.name}", "system:authenticated"]
    asked = {
        "verb": verb,
        "group": group,
        "resource": kind,
        "subresource": subresource,
        "name": name,
        "namespace": space.name if namespace is None else namespace,
    }
    review = {"spec": {"user": user(space, account), "groups": everyone, "resourceAttributes": asked}}
    return bool(client.AuthorizationV1Api().create_subject_access_review(review).status.allowed)


def rules(space: Space, account: str) -> set[tuple[str, str, str]]:
    """The account's permissions in its namespace: (verb, resource, the only name allowed or "")."""
    as_account = client.ApiClient()
    as_account.set_default_header("Impersonate-User", user(space, account))
    review = {"spec": {"namespace": space.name}}
    reviewed = client.AuthorizationV1Api(as_account).create_self_subject_rules_review(review).status
    assert not reviewed.incomplete
    return {
        (verb, f"{resource}.{group}".rstrip("."), name)
        for rule in reviewed.resource_rules
        for verb in rule.verbs
        for group in rule.api_groups
        for resource in rule.resources
        for name in rule.resource_names or [""]
    }


def needed(space: Space, commands: list[str]) -> Iterator[tuple[str, str, str]]:
    for command in commands:
        names = {"secrets": list(names_in_secrets("llama-run"))}
        if command == "preflight":
            names = {resource: [name] for resource, name in {"namespaces": space.name, **NAMES}.items()}
        for verb, resource in documented(command):
            for name in names.get(resource, [""]):
                yield verb, resource, name


def test_each_service_account_has_the_permissions_it_needs_and_no_others(space: Space) -> None:
    """By the API server's list of rules, by single requests, and by a list of forbidden requests."""
    anyone = rules(space, "default")
    for mode, accounts in NEEDS.items():
        objects = render(merged(SMALL, EVERY_RULE, {"pipeline": {"mode": mode}}), namespace=space.name)
        rights = [item for item in objects if item["kind"] == "ServiceAccount" or "Role" in item["kind"]]
        assert {name_of(item) for item in rights if item["kind"] == "ServiceAccount"} == accounts.keys()
        space.apply(*rights)
        for account, commands in accounts.items():
            wanted = set(needed(space, commands))
            assert rules(space, account) - anyone == wanted, f"{mode}: {account}"
            for verb, resource, name in wanted:
                if re.search(r"\.v([2-9]|\d\d)$", name):
                    continue  # the first of Helm's records is enough
                elsewhere = resource in CLUSTER_WIDE
                assert may(space, account, verb, resource, name, "" if elsewhere else None), (account, verb, resource)
                if not elsewhere:
                    assert not may(space, account, verb, resource, name, "kube-system"), (account, verb, resource)
                if name:
                    assert not may(space, account, verb, resource, "another"), (account, verb, resource)
            for verb, resource, name, namespace in DENIED:
                if namespace is not None or (verb, resource, name) not in wanted:
                    assert not may(space, account, verb, resource, name, namespace), (account, verb, resource)


def test_only_compile_and_train_hold_devices_and_only_api_clients_a_token_during_a_whole_run(space: Space) -> None:
    """With TrainJobs, whose pods have a template of their own; each stage waits for the previous one, too."""
    devices = {NEURON: 1, EFA: 2}
    no_token = {"STAND_IN": "test ! -e /var/run/secrets/kubernetes.io || exit 2"}
    settings: Values = {"workload": "trainjob", "devices": devices, "stageDefaults": {"extraEnv": no_token}}
    release = space.release(4)
    release.install(merged(stand_in(), settings))
    stages_in_order(space.history)
    assert release("test", release.name).status == 0
    release.uninstall()

    pods = [pod for pod in space.history.pods() if component_of(pod)]
    held = {
        (component_of(pod), resource): count
        for pod in pods
        for resource in (NEURON, EFA)
        if (count := holds(pod, resource))
    }
    assert held == {(stage, resource): count for stage in ("compile", "train") for resource, count in devices.items()}
    assert sum(holds(pod, NEURON) for pod in pods) == 2 * 2 * devices[NEURON], "two stages of two workers"

    with_token = {component_of(pod) for pod in pods if has_token(pod)}
    assert with_token == CALL_THE_API
    assert {component_of(pod) for pod in pods} - with_token == {
        "tokenize",
        "compile",
        "train",
        "consolidate",
        "merge",
        "evaluate",
        "verify",
    }


def has_token(pod: dict) -> bool:
    sources = [source for volume in pod["spec"]["volumes"] for source in volume.get("projected", {}).get("sources", [])]
    mounted = any("serviceAccountToken" in source for source in sources)
    assert pod["spec"]["automountServiceAccountToken"] is mounted, name_of(pod)
    return mounted
