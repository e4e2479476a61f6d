"""Pod Security, secrets, tokens and RBAC: rules that hold for every values file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import genvalues.cluster
from chart.manifests import (
    MINIMAL,
    Object,
    Pod,
    Refused,
    Values,
    annotation,
    config,
    merged,
    one,
    pod,
    pods,
    render,
)
from chart.test_names import CLUSTER_SCOPED
from genvalues.cluster.helm_records import names_in_secrets

CALLS_THE_API = {"preflight", "compile-gate", "train-gate", "cleanup", "runner"}
RUNS_AS_ROOT = "storage-prepare"


def restricted(pod: Pod) -> Iterator[str]:
    """Violations of Pod Security `restricted`: https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    spec = pod.spec
    of_pod = spec.get("securityContext", {})
    for shared in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(shared):
            yield shared
    if of_pod.get("sysctls"):
        yield "sysctls"
    if spec.get("ephemeralContainers"):
        yield "ephemeralContainers"
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for volume in spec.get("volumes", []):
        if other := volume.keys() - {"name"} - kinds:
            yield f"volume {volume['name']}: {other}"
    for container in pod.containers:
        own = container.get("securityContext", {})
        effective = {**of_pod, **own}
        name = container["name"]
        if own.get("privileged"):
            yield f"{name}: privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation is not false"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            yield f"{name}: keeps capabilities"
        if added := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{name}: adds {added}"
        if effective.get("runAsNonRoot") is not True:
            yield f"{name}: runAsNonRoot is not true"
        if effective.get("runAsUser") == 0:
            yield f"{name}: runs as user 0"
        if effective.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            yield f"{name}: no seccomp profile"
        if own.get("procMount", "Default") != "Default":
            yield f"{name}: procMount"
        for options in (of_pod, own):
            for word in ("seLinuxOptions", "windowsOptions", "appArmorProfile"):
                if options.get(word):
                    yield f"{name}: {word}"
        for port in container.get("ports", []):
            if port.get("hostPort"):
                yield f"{name}: hostPort"


def test_every_pod_passes_pod_security_restricted(objects: list[Object]) -> None:
    for each in pods(objects):
        if each.stage != RUNS_AS_ROOT:
            assert list(restricted(each)) == [], each.stage


def test_storage_prepare_runs_as_root_with_only_the_capability_chown(objects: list[Object]) -> None:
    for each in pods(objects):
        if each.stage == RUNS_AS_ROOT:
            assert set(restricted(each)) == {
                "storage-prepare: adds {'CHOWN'}",
                "storage-prepare: runAsNonRoot is not true",
                "storage-prepare: runs as user 0",
            }
            user = next(other for other in pods(objects) if other.stage == "tokenize").spec["securityContext"]
            workspace = each.environment["LLAMA_LORA_WORKSPACE"]
            assert each.containers[0]["command"] == ["chown", f"{user['runAsUser']}:{user['runAsGroup']}", workspace]


def test_no_secret_value_anywhere(objects: list[Object]) -> None:
    """Values that look like a secret are rejected: test_refusals."""
    assert not [item for item in objects if item["kind"] == "Secret"]
    assert not re.search(r"hf_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{16}|-----BEGIN", str(objects))
    for each in pods(objects):
        assert not [volume for volume in each.spec["volumes"] if "secret" in volume]
        for container in each.containers:
            sources = container.get("envFrom", [])
            assert not sources or each.stage not in {*CALLS_THE_API, RUNS_AS_ROOT}, "a variable can run code"
            assert all(source.keys() - {"prefix"} in ({"secretRef"}, {"configMapRef"}) for source in sources)
            for entry in container["env"]:
                if re.search(r"TOKEN(?!IZERS)|SECRET|PASSWORD|KEY|OTLP_HEADERS", entry["name"]):
                    assert entry.keys() == {"name", "valueFrom"} and entry["valueFrom"].keys() == {"secretKeyRef"}


def secrets_of(each: Pod) -> list[Object]:
    """The variables that a pod takes from Secrets."""
    entries = [entry for container in each.containers for entry in container["env"]]
    return [entry for entry in entries if "secretKeyRef" in entry.get("valueFrom", {})]


def variable(name: str, secret: str, key: str) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def test_only_tokenize_gets_the_token(helm: int) -> None:
    objects = render(merged(MINIMAL, {"huggingFace": {"tokenSecret": "gated", "tokenKey": "hf"}}), helm=helm)
    for each in pods(objects):
        token = variable("HF_TOKEN", "gated", "hf")
        assert secrets_of(each) == ([token] if each.stage == "tokenize" else []), each.stage
    assert "HF_TOKEN" not in str(render(MINIMAL, helm=helm))


@pytest.mark.parametrize(
    ("publish", "wanted"),
    [
        ({"hub": {"merged": "org/model", "tokenSecret": "writes", "tokenKey": "w"}}, ("writes", "w")),
        ({"hub": {"adapter": "org/model"}}, ("gated", "token")),
        ({"s3": {"uri": "s3://bucket/a"}}, None),
    ],
)
def test_publish_gets_its_own_token_and_only_for_the_hub(publish: Values, wanted: tuple[str, str] | None) -> None:
    values = merged(MINIMAL, {"huggingFace": {"tokenSecret": "gated"}, "publish": publish})
    objects = render(values)
    expected = {"tokenize": [variable("HF_TOKEN", "gated", "token")]}
    if wanted:
        expected["publish"] = [variable("HF_TOKEN", *wanted)]
    assert {each.stage: secrets_of(each) for each in pods(objects) if secrets_of(each)} == expected
    [rule] = [rule for rule in one(objects, "Role", "llama-preflight")["rules"] if rule["resources"] == ["secrets"]]
    assert rule["resourceNames"] == list(dict.fromkeys(["gated", *(wanted or ())[:1]]))
    others = config(objects, "cluster.yaml")["otherSecrets"]
    assert others == ([{"name": "writes", "key": "w"}] if wanted and wanted[0] == "writes" else [])


TRACKERS = ["WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]


def test_credentials_of_monitoring_are_single_variables_of_the_trainer() -> None:
    """Not envFrom: a Secret that may set any variable may run code (LD_PRELOAD)."""
    monitoring = {
        "wandb": True,
        "mlflow": True,
        "pushgateway": "http://gateway:9091",
        "otlpEndpoint": "http://collector:4318",
        "secretName": "keys",
    }
    server = {"stages": {"train": {"extraEnv": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}}}}
    objects = render(merged(MINIMAL, {"monitoring": monitoring}, server))
    pushes = ["PUSHGATEWAY_USERNAME", "PUSHGATEWAY_PASSWORD", "OTEL_EXPORTER_OTLP_HEADERS"]
    for each in pods(objects):
        names = [entry["name"] for entry in secrets_of(each)]
        assert all(entry["valueFrom"]["secretKeyRef"]["optional"] for entry in secrets_of(each))
        is_trainer = each.containers[0]["command"][0] == "llama-lora" and each.stage != "verify"
        assert names == ([*pushes, *TRACKERS] if each.stage == "train" else pushes if is_trainer else []), each.stage
    assert config(objects, "cluster.yaml")["otherSecrets"] == [{"name": "keys", "key": ""}]


@pytest.mark.parametrize("url", ["http://user:password@gateway:9091", "gateway:9091", "http://a/?token=x", "file:///x"])
def test_a_url_with_credentials_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        render(merged(MINIMAL, {"monitoring": {"pushgateway": url}}))


def test_only_publish_gets_the_role_that_may_write() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/writes"}
    values = {"serviceAccount": {"publishAnnotations": role}, "publish": {"s3": {"uri": "s3://bucket/a"}}}
    objects = render(merged(MINIMAL, values))
    having = {item["metadata"]["name"] for item in objects if annotation(item, "eks.amazonaws.com/role-arn")}
    assert having == {"llama-publish"}
    assert [each.stage for each in pods(objects) if each.spec["serviceAccountName"] in having] == ["publish"]
    assert "llama-publish" not in str(render(MINIMAL)), "no account without its stage"


def test_only_api_clients_mount_a_service_account_token(objects: list[Object]) -> None:
    for each in pods(objects):
        assert each.spec["automountServiceAccountToken"] is (each.stage in CALLS_THE_API), each.stage
        assert each.spec["enableServiceLinks"] is False
    for account in (item for item in objects if item["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_only_tokenize_gets_the_aws_role() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/reads"}
    objects = render(merged(MINIMAL, {"serviceAccount": {"annotations": role}}))
    having = {
        item["metadata"]["name"] for item in objects if annotation(item, "eks.amazonaws.com/role-arn") is not None
    }
    assert having == {"llama-tokenize"}
    assert [each.stage for each in pods(objects) if each.spec["serviceAccountName"] in having] == ["tokenize"]


def test_every_container_has_requests_and_limits(objects: list[Object]) -> None:
    for each in pods(objects):
        for container in each.containers:
            for bound in ("requests", "limits"):
                assert container["resources"][bound].keys() >= {"cpu", "memory"}, f"{each.stage} {bound}"


def test_every_account_that_a_pod_uses_is_created_with_its_role(objects: list[Object], values_file: Any) -> None:
    made = {item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount"}
    if "create: false" in values_file.read_text():
        assert not made
        assert not [item for item in objects if "Role" in item["kind"]]
        return
    for each in pods(objects):
        account = each.spec["serviceAccountName"]
        if account == "merges" and values_file.name == "everything-values.yaml":
            continue  # stages.merge.serviceAccountName, which exists
        assert account in made
        has_role = any(item["kind"] == "Role" and item["metadata"]["name"] == account for item in objects)
        assert has_role is (each.stage in CALLS_THE_API), f"{each.stage}: {account}"
    for binding in (item for item in objects if item["kind"].endswith("RoleBinding")):
        assert one(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        [subject] = binding["subjects"]
        assert subject["name"] in made
        assert subject["namespace"] == "research"


def granted(objects: list[Object], kind: str, name: str) -> set[tuple[str, str]]:
    """(verb, resource) pairs, with kubectl's resource names."""
    pairs = set()
    for rule in one(objects, kind, name)["rules"]:
        assert "*" not in str(rule)
        [group] = rule["apiGroups"]
        for resource in rule["resources"]:
            pairs |= {(verb, f"{resource}.{group}".rstrip(".")) for verb in rule["verbs"]}
    return pairs


def documented(command: str) -> set[tuple[str, str]]:
    """A command's API requests, from the table in the docstring of genvalues.cluster."""
    pairs = set()
    for line in str(genvalues.cluster.__doc__).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == [command] and len(words) > 2:
            pairs |= {(verb, words[1]) for verb in words[2:]}
    assert pairs
    return pairs


def test_roles_grant_exactly_what_the_commands_request(helm: int) -> None:
    values = merged(MINIMAL, {"huggingFace": {"tokenSecret": "gated"}, "kueue": {"queueName": "research"}})
    objects = render(merged(values, {"rbac": {"clusterScopedReads": True}}), helm=helm)
    in_cluster = granted(objects, "ClusterRole", "research.llama-preflight")
    kueue = {"clusterqueues.kueue.x-k8s.io", "workloadpriorityclasses.kueue.x-k8s.io"}
    assert {resource for _, resource in in_cluster} == {"nodes", "storageclasses.storage.k8s.io", *kueue}
    assert granted(objects, "Role", "llama-preflight") | in_cluster == documented("preflight")
    assert granted(objects, "Role", "llama-gate") == documented("gate")
    assert granted(objects, "Role", "llama-cleanup") == documented("cleanup")


def test_detached_roles_grant_exactly_what_the_commands_and_helm_request(helm: int) -> None:
    objects = render(merged(MINIMAL, {"pipeline": {"mode": "detached"}}), helm=helm)
    assert granted(objects, "Role", "llama-runner") == documented("runner") | documented("upgrade")
    assert granted(objects, "Role", "llama-cleanup") == documented("cleanup") | documented("uninstall")
    assert ("watch", "pytorchjobs.kubeflow.org") in documented("upgrade"), "Helm 4 watches every hook"


def test_the_role_of_preflight_is_for_the_workload_that_the_release_uses() -> None:
    granted_to = granted(render(merged(MINIMAL, {"workload": "trainjob"})), "Role", "llama-preflight")
    assert documented("preflight-trainjob") <= granted_to
    assert not any("pytorchjobs" in resource for _, resource in granted_to)


def test_preflight_may_read_only_the_queues_of_the_values() -> None:
    objects = render(merged(MINIMAL, {"kueue": {"queueName": "trn", "cpuQueueName": "cpu"}}))
    rules = one(objects, "Role", "llama-preflight")["rules"]
    [names] = [rule["resourceNames"] for rule in rules if rule["resources"] == ["localqueues"]]
    assert names == ["trn", "cpu"]


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_the_default_install_makes_no_cluster_scoped_object(mode: str) -> None:
    objects = render(merged(MINIMAL, {"pipeline": {"mode": mode}}))
    assert not [item["kind"] for item in objects if item["kind"] in CLUSTER_SCOPED]
    assert "clusterScopedReads: false" in one(render(MINIMAL), "ConfigMap")["data"]["cluster.yaml"]


def test_values_of_an_existing_release_keep_its_cluster_role() -> None:
    objects = render(merged(MINIMAL, {"rbac": {"clusterScopedReads": True}}))
    assert {item["kind"] for item in objects} & CLUSTER_SCOPED == {"ClusterRole", "ClusterRoleBinding"}
    assert "clusterScopedReads: true" in one(objects, "ConfigMap")["data"]["cluster.yaml"]


def of_trainjobs(*commands: str) -> set[tuple[str, str]]:
    """The documented requests of the commands with workload trainjob."""
    found = {pair for command in commands for pair in documented(command) if "pytorchjobs" not in pair[1]}
    return found.union(*(documented(f"{command}-trainjob") for command in commands if command not in OWN_API))


OWN_API = {"runner", "uninstall"}  # commands that know nothing of workloads
SERVED = {"pytorchjobs": "kubeflow.org/v1/PyTorchJob", "trainjobs": "trainer.kubeflow.org/v1alpha1/TrainJob"}


def test_roles_grant_exactly_what_a_trainjob_needs(helm: int) -> None:
    in_queue: dict[str, Any] = {"kueue": {"queueName": "research"}}
    objects = render(merged(MINIMAL, {"workload": "trainjob", "pipeline": {"mode": "detached"}, **in_queue}), helm=helm)
    assert granted(objects, "Role", "llama-gate") == of_trainjobs("gate")
    assert granted(objects, "Role", "llama-cleanup") == of_trainjobs("cleanup", "uninstall")
    assert granted(objects, "Role", "llama-runner") == of_trainjobs("runner", "upgrade")


@pytest.mark.parametrize(("workload", "other"), [("pytorchjob", "trainjobs"), ("trainjob", "pytorchjobs")])
def test_where_the_other_workload_is_served_its_jobs_are_seen_by_the_gate_and_deleted_by_cleanup(
    workload: str, other: str
) -> None:
    values = merged(MINIMAL, {"workload": workload})

    def verbs(account: str, served: tuple[str, ...]) -> set[str]:
        rendered = render(values, api_versions=served)
        return {verb for verb, resource in granted(rendered, "Role", account) if resource.startswith(f"{other}.")}

    assert verbs("llama-gate", ()) == verbs("llama-cleanup", ()) == set()
    assert verbs("llama-gate", (SERVED[other],)) == {"list"}
    assert verbs("llama-cleanup", (SERVED[other],)) == {"list", "patch", "delete"}


def test_secrets_are_read_and_deleted_by_name_alone() -> None:
    def rules_about_secrets(values: dict[str, Any]) -> dict[str, list[Object]]:
        roles = (item for item in render(values) if item["kind"] in {"Role", "ClusterRole"})
        found = {role["metadata"]["name"]: [r for r in role["rules"] if "secrets" in r["resources"]] for role in roles}
        return {name: rules for name, rules in found.items() if rules}

    assert rules_about_secrets(MINIMAL) == {}
    gated = merged(MINIMAL, {"huggingFace": {"tokenSecret": "gated"}})
    assert rules_about_secrets(gated) == {
        "llama-preflight": [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["gated"], "verbs": ["get"]}]
    }
    detached = merged(MINIMAL, {"pipeline": {"mode": "detached"}})
    found = rules_about_secrets(detached)
    assert found.keys() == {"llama-runner", "llama-cleanup"}
    verbs = {"llama-runner": ["get", "delete"], "llama-cleanup": ["delete"]}
    for role, rules in found.items():
        names = list(names_in_secrets("llama-run"))
        assert rules == [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": names, "verbs": verbs[role]}]


def test_the_image_digest_takes_precedence_over_the_tag() -> None:
    digest = "sha256:" + "0" * 64
    assert image({}) == "llama-lora:0.1.0"
    assert image({"tag": "v2"}) == "llama-lora:v2"
    assert image({"tag": "v2", "digest": digest}) == f"llama-lora@{digest}"


def image(settings: dict[str, str]) -> str:
    return str(pod(render(merged(MINIMAL, {"image": settings})), "train").containers[0]["image"])
