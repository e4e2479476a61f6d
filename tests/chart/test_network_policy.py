"""networkPolicy: who may connect to the pods of a run, and where they may connect to."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from chart.manifests import MINIMAL, Object, Values, config, merged, pods, render

ON: Values = {"networkPolicy": {"enabled": True}}
EVERYTHING: Values = {"rehearse": {"enabled": True}, "publish": {"s3": {"uri": "s3://bucket/a"}}}
ANYWHERE, DNS, WORKERS = "anywhere", "DNS", "workers"


class Allowed(NamedTuple):
    ingress: frozenset[Any]
    egress: frozenset[Any]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def peers(rules: list[Object], word: str, labels: dict[str, str]) -> set[Any]:
    """What rules allow: ports of any address, ANYWHERE, or WORKERS on every port."""
    found: set[Any] = set()
    for rule in rules:
        assert rule.keys() <= {word, "ports"}
        ports = {(port["protocol"], port["port"]) for port in rule.get("ports", [])}
        if word in rule:
            [peer] = rule[word]
            assert not ports and selects(peer["podSelector"], labels) and peer.keys() == {"podSelector"}
            found.add(WORKERS)
        elif ports == {("UDP", 53), ("TCP", 53)}:
            found.add(DNS)
        elif ports:
            assert {protocol for protocol, _ in ports} == {"TCP"}
            found |= {port for _, port in ports}
        else:
            found.add(ANYWHERE)
    return found


def allowed(objects: list[Object], labels: dict[str, str]) -> Allowed:
    """What all policies together allow a pod: none selects it for a direction: anywhere."""
    sides = {}
    for direction, word in (("Ingress", "from"), ("Egress", "to")):
        mine = [
            item["spec"]
            for item in objects
            if item["kind"] == "NetworkPolicy"
            and selects(item["spec"]["podSelector"], labels)
            and direction in item["spec"]["policyTypes"]
        ]
        rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
        sides[direction.lower()] = frozenset(peers(rules, word, labels) if mine else {ANYWHERE})
    return Allowed(**sides)


def by_stage(values: Values, **options: Any) -> dict[str, Allowed]:
    objects = render(values, **options)
    return {each.stage: allowed(objects, each.template["metadata"]["labels"]) for each in pods(objects)}


def test_there_is_none_by_default() -> None:
    assert not [item for item in render(MINIMAL) if item["kind"] == "NetworkPolicy"]


def test_only_workers_reach_workers_and_only_tokenize_and_publish_reach_outside(helm: int) -> None:
    found = by_stage(merged(MINIMAL, EVERYTHING, ON), helm=helm)
    for stage, may in found.items():
        trains = stage in {"compile", "train"}
        assert may.ingress == (frozenset({WORKERS}) if trains else frozenset()), stage
        if stage in {"tokenize", "publish"}:
            assert may.egress == {DNS, ANYWHERE}
        elif stage in {"preflight", "compile-gate", "train-gate", "cleanup"}:
            assert may.egress == {DNS, 443, 6443}, stage
        else:
            assert may.egress == ({DNS, WORKERS} if trains else {DNS}), stage
    assert found.keys() >= {"merge", "evaluate", "consolidate", "rehearse", "verify", "storage-prepare"}


def test_a_pod_of_another_run_is_not_a_worker_of_this_one() -> None:
    objects = render(merged(MINIMAL, ON))
    others = next(each for each in pods(render(MINIMAL, release="other")) if each.stage == "train")
    [policy] = [item["spec"] for item in objects if item.get("spec", {}).get("ingress")]
    [rule] = policy["ingress"]
    assert not selects(rule["from"][0]["podSelector"], others.template["metadata"]["labels"])


def test_monitored_stages_reach_the_ports_of_monitoring_and_train_those_of_its_trackers() -> None:
    monitoring = {
        "pushgateway": "http://gateway.monitoring:9091",
        "otlpEndpoint": "https://collector.example.com/base",
        "wandb": True,
        "mlflow": True,
    }
    server = {"stages": {"train": {"extraEnv": {"MLFLOW_TRACKING_URI": "http://mlflow.ml:5000/x"}}}}
    more = {"networkPolicy": {"trainPorts": [8080]}}
    found = by_stage(merged(MINIMAL, ON, {"monitoring": monitoring}, server, more))
    assert found["merge"].egress == {DNS, 9091, 443}
    assert found["train"].egress == {DNS, WORKERS, 9091, 443, 5000, 8080}
    plain = by_stage(merged(MINIMAL, ON, {"monitoring": {"pushgateway": "http://gateway"}}))
    assert plain["merge"].egress == {DNS, 80}, "the port of http"


@pytest.mark.parametrize("ports", [[443, 6443], [8443]])
def test_a_detached_releases_policies_hold_for_the_stages_of_its_inner_release(ports: list[int]) -> None:
    policy = {"networkPolicy": {"enabled": True, "apiServerPorts": ports}}
    outer = render(merged(MINIMAL, policy, {"pipeline": {"mode": "detached"}}))
    inner = render(config(outer, "values.yaml"), release="llama-run")
    assert not [item for item in inner if item["kind"] == "NetworkPolicy"], "the runner may not make any"
    may = {each.stage: allowed(outer, each.template["metadata"]["labels"]) for each in [*pods(outer), *pods(inner)]}
    assert may["train"] == Allowed(frozenset({WORKERS}), frozenset({DNS, WORKERS}))
    assert may["merge"] == Allowed(frozenset(), frozenset({DNS}))
    for stage in ("runner", "train-gate", "preflight", "cleanup"):
        assert may[stage] == Allowed(frozenset(), frozenset({DNS, *ports})), stage
