"""Settings that stages and jobs take from the cluster: Secrets, accounts, labels, reserved nodes, further objects."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from chart.manifests import CHART, MINIMAL, ROOT, Object, Values, config, merged, one, pod, pods, refusal, render
from chart.test_pipeline import TRAINER, TRAINIUM
from genvalues.cluster.follower import TIMINGS
from genvalues.inputs.chart import on_top_of_defaults
from genvalues.settings.value_rules import contradictions

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SECRETS: Values = {
    "extraEnvSecrets": {"WANDB_API_KEY": {"name": "wandb", "key": "api-key"}},
    "extraEnvFrom": {
        "tracking": {"secretRef": {"name": "tracking"}},
        "site": {"configMapRef": {"name": "site", "optional": True}, "prefix": "SITE_"},
    },
}


def variables(each: Any) -> list[Object]:
    return list(each.containers[0]["env"])


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_variables_of_secrets_reach_the_stages_of_the_trainer_and_no_pod_with_permissions(mode: str, helm: int) -> None:
    everything = {"rehearse": {"enabled": True}, "publish": {"s3": {"uri": "s3://bucket/a"}}}
    objects = render(merged(MINIMAL, everything, {"stageDefaults": SECRETS, "pipeline": {"mode": mode}}), helm=helm)
    wanted = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}}
    for each in pods(objects):
        [container] = each.containers
        if each.stage in TRAINER:
            assert wanted in container["env"], each.stage
            assert container["envFrom"] == [
                {"configMapRef": {"name": "site", "optional": True}, "prefix": "SITE_"},
                {"secretRef": {"name": "tracking"}},
            ]
        else:
            assert "envFrom" not in container and wanted not in container["env"], each.stage
    if mode == "detached":
        inner = config(objects, "values.yaml")
        assert inner["stageDefaults"]["extraEnvSecrets"] == SECRETS["extraEnvSecrets"], "names only, for the stages"


@pytest.mark.parametrize("mode", ["attached", "detached"])
@pytest.mark.parametrize("nothing", [None, {"requests": None}, {"limits": None}], ids=str)
def test_a_key_of_a_stage_that_is_null_takes_away_what_all_stages_have(mode: str, nothing: object, helm: int) -> None:
    keys = dict.fromkeys(DEFAULTS["stageDefaults"]) | {"terminationGracePeriodSeconds": 60, "resources": nothing}
    stages = dict.fromkeys(("gate", "runner", "preflight", "merge", "train", "cleanup"), keys)
    usual: Values = {"extraEnv": {"A": "b"}, "podLabels": {"a": "b"}, "nodeSelector": {"a": "b"}}
    objects = render(merged(MINIMAL, {"stageDefaults": usual, "stages": stages, "pipeline": {"mode": mode}}), helm=helm)
    found = {each.stage: each for each in pods(objects)}
    for stage in stages.keys() & found.keys():
        assert "A" not in found[stage].environment and "nodeSelector" not in found[stage].spec
        assert "a" not in found[stage].template["metadata"]["labels"]
    assert mode == "detached" or found["tokenize"].environment["A"] == "b"


def test_a_null_takes_a_key_away_wherever_it_is_written(helm: int) -> None:
    amounts: Values = {"resources": {"limits": {"cpu": None, "hugepages-2Mi": None}}}
    nothing = {stage: amounts for stage, settings in DEFAULTS["stages"].items() if "resources" not in settings}
    usual = {"resources": {"requests": {"ephemeral-storage": None}}, "affinity": {"podAffinity": None}}
    values = merged(MINIMAL, {"stageDefaults": usual, "stages": nothing})
    for each in pods(render(values, helm=helm)):
        resources = each.containers[0]["resources"]
        assert "<nil>" not in str(resources) and None not in each.spec.get("affinity", {}).values()
        if each.stage in ("preflight", "compile-gate", "cleanup", "verify", "storage-prepare"):
            assert resources == {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}


@pytest.mark.parametrize(
    ("stages", "refused"),
    [
        ({"tokenize": {"resources": {"limits": None}}}, "tokenize"),  # so that it has the limits of stageDefaults
        ({"gate": {"resources": {"limits": None, "requests": {"cpu": 9}}}}, None),
        ({"gate": {"resources": {"limits": {"cpu": None}, "requests": {"cpu": 9}}}}, None),
        ({"gate": {"resources": {"requests": {"cpu": 9}}}}, "gate"),
    ],
)
def test_genvalues_and_the_chart_mean_the_same_by_a_null_below_stages(stages: Values, refused: str | None) -> None:
    values = merged(MINIMAL, {"stages": stages})
    found = {each.keys[0][1] for each in contradictions(on_top_of_defaults(CHART, values))}
    if refused is None:
        assert not found and render(values)
    else:
        assert found == {refused} and f"stages.{refused}: resources.requests" in refusal(values)


def test_a_variable_of_a_secret_replaces_the_charts_own_of_the_same_name() -> None:
    own = {"extraEnvSecrets": {name: {"name": "mine", "key": "a"} for name in ("HF_HOME", "WANDB_API_KEY")}}
    monitoring = {"wandb": True, "secretName": "team"}
    objects = render(merged(MINIMAL, {"monitoring": monitoring, "stages": {"train": own}}))
    entries = {entry["name"]: entry for entry in variables(pod(objects, "train"))}
    assert len(entries) == len(variables(pod(objects, "train"))), "each name once"
    for name in ("HF_HOME", "WANDB_API_KEY"):
        assert entries[name]["valueFrom"]["secretKeyRef"]["name"] == "mine"


def test_preflight_checks_the_secrets_of_the_stages_that_run_and_may_read_only_them() -> None:
    optional = {"extraEnvSecrets": {"MAYBE": {"name": "maybe", "key": "a", "optional": True}}}
    publish = {"extraEnvSecrets": {"OTHER": {"name": "unused", "key": "a"}}}
    values = merged(MINIMAL, {"stageDefaults": SECRETS, "stages": {"train": optional, "publish": publish}})
    objects = render(values)
    named = {(each["name"], each["key"]) for each in config(objects, "cluster.yaml")["otherSecrets"]}
    assert named == {("wandb", "api-key"), ("tracking", "")}
    assert len(config(objects, "cluster.yaml")["otherSecrets"]) == 2, "each once"
    [rule] = [rule for rule in one(objects, "Role", "llama-preflight")["rules"] if rule["resources"] == ["secrets"]]
    assert set(rule["resourceNames"]) == {"wandb", "tracking"} and rule["verbs"] == ["get"]


def test_a_stage_can_have_an_account_of_its_own() -> None:
    objects = render(merged(MINIMAL, {"stages": {"train": {"serviceAccountName": "logs-to-s3"}}}))
    accounts = {each.stage: each.spec["serviceAccountName"] for each in pods(objects)}
    assert accounts.pop("train") == "logs-to-s3"
    assert "logs-to-s3" not in accounts.values()
    assert pod(objects, "train").spec["automountServiceAccountToken"] is False


def test_by_default_no_container_may_do_more_than_before() -> None:
    for each in pods(render(MINIMAL)):
        [container] = each.containers
        added = ["CHOWN"] if each.stage == "storage-prepare" else None
        assert container["securityContext"]["capabilities"].get("add") == added
        assert each.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "supplementalGroups" not in each.spec["securityContext"]
        assert "envFrom" not in container


def test_common_labels_are_on_every_object_and_pod_and_never_replace_the_charts(helm: int) -> None:
    labels = {"cost-center": "ml", "app.kubernetes.io/component": "mine", "llama-lora/run": "other"}
    storage = {"kind": "fsx-static", "static": {"fileSystemId": "fs-01234567", "dnsName": "a.b", "mountName": "fsx"}}
    more = {"networkPolicy": {"enabled": True}, "extraObjects": {"a": {"apiVersion": "v1", "kind": "Service"}}}
    more["rbac"] = {"clusterScopedReads": True}
    values = merged(MINIMAL, {"commonLabels": labels, "storage": storage}, more)
    plain = {
        kind_and_name(item): item["metadata"]["labels"] for item in render(merged(MINIMAL, {"storage": storage}, more))
    }
    objects = render(values, helm=helm)
    assert {item["kind"] for item in objects} >= {"PersistentVolume", "PersistentVolumeClaim", "ClusterRole", "Service"}
    for item in objects:
        found = item["metadata"]["labels"]
        assert found["cost-center"] == "ml", kind_and_name(item)
        assert plain[kind_and_name(item)].items() <= found.items(), kind_and_name(item)
    for each in pods(objects):
        found = each.template["metadata"]["labels"]
        assert found["cost-center"] == "ml" and found["app.kubernetes.io/component"] == each.stage
        assert found["llama-lora/run"] == config(objects, "cluster.yaml")["run"]


def kind_and_name(item: Object) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]


def test_the_inner_release_has_the_common_labels_but_not_the_further_objects_and_policies() -> None:
    more = {"networkPolicy": {"enabled": True}, "extraObjects": {"a": {"apiVersion": "v1", "kind": "Service"}}}
    outer = render(merged(MINIMAL, {"commonLabels": {"a": "b"}, "pipeline": {"mode": "detached"}}, more))
    assert {"Service", "NetworkPolicy"} <= {item["kind"] for item in outer}
    inner = render(config(outer, "values.yaml"), release="llama-run")
    assert not {"Service", "NetworkPolicy"} & {item["kind"] for item in inner}
    assert all(item["metadata"]["labels"]["a"] == "b" for item in inner)


def test_text_of_several_lines_reaches_the_stages_of_a_detached_release_as_it_was_written(helm: int) -> None:
    text = "rates:\n  first: 5e-05\n\n  second: -1e-06"
    settings: Values = {"stages": {"tokenize": {"extraEnv": {"RATES": text}}}}
    outer = render(merged(MINIMAL, settings, {"pipeline": {"mode": "detached"}}), helm=helm)
    inner = render(config(outer, "values.yaml"), helm=helm, release="llama-run")
    assert pod(inner, "tokenize").environment["RATES"] == text


@pytest.mark.parametrize("stage", ["compile", "train"])
def test_a_longer_grace_period_is_waited_for_by_the_gate_and_by_cleanup(stage: str) -> None:
    values: Values = {"stages": {stage: {"terminationGracePeriodSeconds": 300}}, "cleanup": {"timeoutSeconds": 320}}
    objects = render(merged(MINIMAL, values))
    assert pod(objects, stage).spec["terminationGracePeriodSeconds"] == 300
    assert pod(objects, stage).environment["LLAMA_LORA_GRACE_SECONDS"] == "300"
    assert TIMINGS.pods_gone >= 300 + 300, "the longest grace period, and 5 minutes until a lost node is evicted"


def test_a_grace_period_that_was_taken_away_is_the_default() -> None:
    """`helm upgrade --reuse-values` from a chart without the key, too."""
    for stages in (None, {"train": None}, {"train": {"terminationGracePeriodSeconds": None}}):
        shorter: Values = {"stageDefaults": {"terminationGracePeriodSeconds": 10}, "sharedMemory": "512Mi"}
        values = merged(MINIMAL, {"stages": stages}, shorter)
        assert pod(render(values), "train").spec["terminationGracePeriodSeconds"] == 120


# --- capacity reservations

RESERVED: list[tuple[Values, dict[str, str]]] = [
    (
        {"provisioner": "karpenter", "type": "capacity-block", "id": "cr-0123456789abcdef0"},
        {
            "karpenter.sh/capacity-type": "reserved",
            "karpenter.k8s.aws/capacity-reservation-type": "capacity-block",
            "karpenter.k8s.aws/capacity-reservation-id": "cr-0123456789abcdef0",
        },
    ),
    ({"provisioner": "karpenter"}, {"karpenter.sh/capacity-type": "reserved"}),
    (
        {"provisioner": "auto-mode", "id": "cr-0123456789abcdef0"},
        {
            "karpenter.sh/capacity-type": "reserved",
            "eks.amazonaws.com/capacity-reservation-id": "cr-0123456789abcdef0",
        },
    ),
    (
        {"provisioner": "node-group", "type": "capacity-block", "group": "trn2"},
        {"eks.amazonaws.com/capacityType": "CAPACITY_BLOCK", "eks.amazonaws.com/nodegroup": "trn2"},
    ),
    ({"provisioner": "node-group", "group": "odcr"}, {"eks.amazonaws.com/nodegroup": "odcr"}),
    (
        {"provisioner": "hyperpod", "group": "plan-1"},
        {"sagemaker.amazonaws.com/instance-group-name": "plan-1"},
    ),
]


@pytest.mark.parametrize(("reservation", "labels"), RESERVED)
def test_a_reservation_selects_its_nodes_for_compile_and_train_alone(
    reservation: Values, labels: dict[str, str]
) -> None:
    objects = render(merged(TRAINIUM, {"capacityReservation": reservation}))
    for each in pods(objects):
        selected = each.spec.get("nodeSelector", {})
        if each.trains:
            assert selected == {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge", **labels}
        else:
            assert not labels.keys() & selected.keys()


# --- further objects


def test_further_objects_are_templates_and_belong_to_the_release(helm: int) -> None:
    values: Values = {
        "extraObjects": {
            "monitor": {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PodMonitor",
                "metadata": {"name": '{{ include "llama-lora.fullname" . }}-pods', "labels": {"release": "prometheus"}},
                "spec": {"selector": {"matchLabels": {"llama-lora/run": '{{ include "llama-lora.run.label" . }}'}}},
            },
            "plain": {"apiVersion": "v1", "kind": "Service", "spec": {"clusterIP": "None"}},
        }
    }
    objects = render(merged(MINIMAL, values), helm=helm)
    monitor = one(objects, "PodMonitor")
    assert monitor["metadata"]["name"] == "llama-pods"
    assert (
        monitor["metadata"]["labels"].items()
        >= {
            "release": "prometheus",
            "app.kubernetes.io/instance": "llama",
        }.items()
    )
    run = config(objects, "cluster.yaml")["run"]
    assert monitor["spec"] == {"selector": {"matchLabels": {"llama-lora/run": run}}}
    assert one(objects, "Service")["metadata"]["name"] == "plain"


# --- docs/pods.md


def examples() -> list[str]:
    page = (ROOT / "docs/pods.md").read_text(encoding="utf-8")
    section = page.partition("## Settings of the pods\n")[2].partition("\n## ")[0]
    return re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)


@pytest.mark.parametrize("example", examples())
def test_an_example_of_the_page_does_something(example: str) -> None:
    values = yaml.safe_load(example)
    assert render(merged(TRAINIUM, values)) != render(TRAINIUM)


def test_the_page_has_an_example_of_each_setting() -> None:
    shown = " ".join(examples())
    settings = ["extraEnvSecrets", "extraEnvFrom", "jobLabels", "commonLabels", "topologySpreadConstraints"]
    settings += ["schedulerName", "serviceAccountName", "supplementalGroups", "seccompProfile", "extraObjects"]
    settings += ["terminationGracePeriodSeconds", "ephemeral-storage", "networkPolicy", "capacityReservation"]
    assert [setting for setting in settings if setting not in shown] == []
