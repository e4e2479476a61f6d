"""Pod settings in the values reach every pod of the chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from chart.manifests import Values, merged
from cluster.space import Space, run, stand_in
from genvalues.cluster.objects import annotations_of, component_of, condition, labels_of

OF_THE_TRAINER = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]
OTHERS = ["runner", "cleanup", "preflight", "storage-prepare", "compile-gate", "train-gate", "verify"]
KEYS = {"storage-prepare": "storagePrepare", "compile-gate": "gate", "train-gate": "gate"}

TOLERATION = {"key": "example.com/dedicated", "operator": "Equal", "value": "research", "effect": "NoSchedule"}
LINUX = [{"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}]}]
AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": LINUX}}}
FOR_EVERY_STAGE: Values = {
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [TOLERATION],
    "affinity": AFFINITY,
    "extraEnv": {
        "GREETING": "for all",
        "STAND_IN": "cd /workspace; mkdir -p seen; touch /scratch/of-all /scratch-of-stage/own &&"
        ' echo "$GREETING, $OWN, $(cat /words/word)" > seen/$OWN',
    },
    "extraVolumes": {"scratch": {"emptyDir": {}}, "words": {"configMap": {"name": "words"}}},
    "extraVolumeMounts": {"scratch": {"mountPath": "/scratch"}, "words": {"mountPath": "/words", "readOnly": True}},
    "podLabels": {"example.com/cost-center": "research"},
    "podAnnotations": {"example.com/note": "for all"},
}


def of_its_own(stage: str) -> Values:
    """Settings of one stage, which override those for every stage key by key."""
    return {
        "extraEnv": {"OWN": stage},
        "extraVolumes": {"own": {"emptyDir": {}}},
        "extraVolumeMounts": {"own": {"mountPath": "/scratch-of-stage"}},
        "podLabels": {"example.com/stage": stage},
        "podAnnotations": {"example.com/stage": stage},
    }


@pytest.fixture
def priority_class(new_space: Callable[..., Space]) -> Iterator[tuple[Space, str]]:
    """A namespace, and a PriorityClass of the same name that never preempts."""
    space = new_space("baseline")
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": space.name}}
    space.apply({**kind, "value": 1000, "preemptionPolicy": "Never"})
    yield space, space.name
    run(["kubectl", "delete", "priorityclass", space.name])


def test_scheduling_environment_volumes_labels_and_annotations_reach_every_pod(
    priority_class: tuple[Space, str],
) -> None:
    """In a whole run in mode detached, which has all stages and the runner's Helm; and as seen inside the stages."""
    space, priority = priority_class
    space.volume.create()
    space.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "words"}, "data": {"word": "mounted"}},
    )
    stages = {KEYS.get(stage, stage): of_its_own(KEYS.get(stage, stage)) for stage in OF_THE_TRAINER + OTHERS}
    release = space.release(4)
    release.install(
        merged(
            stand_in(),
            {
                "pipeline": {"mode": "detached"},
                "storage": {"prepare": {"enabled": True}},
                "stageDefaults": {**FOR_EVERY_STAGE, "priorityClassName": priority},
                "stages": stages,
            },
        )
    )
    space.wait("the runner's end", lambda: condition(space.get("job", "llama-runner-1") or {}, "Complete"))
    assert release("test", "llama").status == 0
    release.uninstall()

    pods = [pod for pod in space.history.pods() if component_of(pod)]
    assert {component_of(pod) for pod in pods} == {*OF_THE_TRAINER, *OTHERS}
    for pod in pods:
        stage, spec = component_of(pod), pod["spec"]
        own = KEYS.get(stage, stage)
        [container] = spec["containers"]
        assert spec["nodeSelector"].items() >= FOR_EVERY_STAGE["nodeSelector"].items(), stage
        assert TOLERATION in spec["tolerations"], stage
        assert spec["affinity"] == AFFINITY, stage
        assert (spec["priorityClassName"], spec["priority"]) == (priority, 1000), stage
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert (environment["GREETING"], environment["OWN"]) == ("for all", own)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.items() >= {"scratch": "/scratch", "words": "/words", "own": "/scratch-of-stage"}.items(), stage
        assert labels_of(pod).items() >= {"example.com/cost-center": "research", "example.com/stage": own}.items()
        assert annotations_of(pod).items() >= {"example.com/note": "for all", "example.com/stage": own}.items()
    seen = space.volume.run("cd seen; for stage in *; do echo $stage: $(cat $stage); done").splitlines()
    assert sorted(seen) == sorted(f"{stage}: for all, {stage}, mounted" for stage in OF_THE_TRAINER)
