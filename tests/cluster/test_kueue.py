"""Kueue: quota, preemption and priority, the default LocalQueue, and what happens without the integration.

They run one after another: the last test restarts Kueue with other settings.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest

from chart.manifests import Object, Values, merged
from cluster.local import node, operators
from cluster.local.operators import FRAMEWORKS, USES_KUEUE
from cluster.space import (
    EFA,
    NEURON,
    STAND_IN_IMAGE,
    Client,
    Release,
    Space,
    asking_for_neuron,
    is_stage,
    run,
    stand_in,
    uids,
)
from genvalues.cluster.objects import COMPONENT, FINGERPRINT, annotations_of, component_of, labels_of, name_of
from genvalues.cluster.workloads import is_suspended, job_of, workload_for

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
API = "kueue.x-k8s.io/v1beta2"
UNTIL_CONTINUE = "until [ -e /workspace/continue ]; do sleep 0.2; done"
BRIEF: Values = {"evaluation": {"enabled": False}}


def values(workload: str, *more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), BRIEF, {"workload": workload}, *more)


class Queues:
    """A ClusterQueue of the test with devices for two workers, its LocalQueues, and two priorities."""

    def __init__(self, space: Space, of_a_worker: int = 1) -> None:
        self.space, self.name, self.of_a_worker = space, space.name, of_a_worker
        space.kubectl("label", "namespace", space.name, *(f"{key}={value}" for key, value in USES_KUEUE.items()))
        names = ["cpu", "memory", NEURON, EFA]
        quotas = dict.fromkeys(names, "1k") | {"memory": "1Ti", NEURON: 2 * of_a_worker, EFA: 2 * of_a_worker}
        resources = [{"name": name, "nominalQuota": quotas[name]} for name in names]
        priorities = [{**self.named("WorkloadPriorityClass", self.priority(p)), "value": p} for p in (1, 100)]
        self.objects = [
            self.named("ResourceFlavor"),
            {
                **self.named("ClusterQueue"),
                "spec": {
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.name}},
                    "resourceGroups": [
                        {"coveredResources": names, "flavors": [{"name": self.name, "resources": resources}]}
                    ],
                    "preemption": {"withinClusterQueue": "LowerPriority"},
                },
            },
            *priorities,
        ]
        self.create(*self.objects)

    def named(self, kind: str, name: str = "") -> Object:
        return {"apiVersion": API, "kind": kind, "metadata": {"name": name or self.name}}

    def priority(self, value: int) -> str:
        return f"{self.name}-{value}"

    def create(self, *objects: Object) -> None:
        """Its webhooks may not answer for some seconds after a start of Kueue."""
        for item in objects:
            self.space.wait(f"{item['kind']} accepted by Kueue", lambda: self.is_accepted(item))  # noqa: B023

    def is_accepted(self, item: Object) -> bool:
        return run([*self.space.base, "apply", "-f", "-"], text=json.dumps(item)).status == 0

    def local_queue(self, name: str) -> None:
        self.create({**self.named("LocalQueue", name), "spec": {"clusterQueue": self.name}})

    def occupy(self, queue: str, priority: int) -> None:
        """Take the whole quota: a Job of two pods that hold the devices, and wait until it runs."""
        self.create(holder(queue, self.priority(priority), self.of_a_worker))
        self.space.wait("the Job that takes the quota", self.is_occupied)

    def is_occupied(self) -> bool:
        job = self.space.get("job", "holder")
        return bool(job and job["status"].get("ready") == 2)

    def leave(self) -> None:
        self.space.kubectl("delete", "job", "holder", "--cascade=foreground", "--wait=false")
        self.space.wait("the end of its pods", lambda: not self.space.get("job", "holder"))

    def remove(self) -> None:
        """ClusterQueue and flavor stay until the namespace's Workloads are gone."""
        for item in self.objects:
            run(["kubectl", "delete", item["kind"].lower(), name_of(item), "--wait=false"])


@pytest.fixture
def new_queues(new_space: Callable[..., Space]) -> Iterator[Callable[[], Queues]]:
    made: list[Queues] = []

    def make() -> Queues:
        space = new_space()
        space.volume.create()
        made.append(Queues(space))
        return made[-1]

    yield make
    for each in made:
        each.remove()


@pytest.fixture
def queues(new_queues: Callable[[], Queues]) -> Queues:
    return new_queues()


def holder(queue: str, priority: str, devices: int) -> Object:
    container = {
        "name": "holder",
        "image": STAND_IN_IMAGE,
        "command": ["sleep", "infinity"],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {NEURON: devices}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "holder", "labels": {QUEUE: queue, PRIORITY: priority}},
        "spec": {"parallelism": 2, "suspend": True, "template": {"spec": pod}},
    }


def job_of_stage(space: Space, stage: str, workload: str) -> Object | None:
    return space.get(workload, f"llama-{stage}-1")


def hold(space: Space, client: Client, stage: str) -> None:
    """Check for a while that the stage gets no pod and that its client waits."""
    space.never(f"{stage} did not wait for its queue", lambda: not client.is_alive() or space.pods("llama", stage), 8)


@pytest.mark.parametrize("workload", ["pytorchjob", pytest.param("trainjob", marks=pytest.mark.repeat)])
def test_a_job_waits_for_its_quota_is_preempted_by_a_higher_priority_and_runs_again(
    queues: Queues, workload: str
) -> None:
    space = queues.space
    queues.local_queue("research")
    settings: Values = {"kueue": {"queueName": "research", "priorityClass": queues.priority(1)}}
    queues.occupy("research", 1)
    llama = space.release(4)
    client = llama.start_install(values(workload, settings, train=UNTIL_CONTINUE))

    def queued(stage: str) -> bool:
        job = job_of_stage(space, stage, workload)
        return bool(job and labels_of(job).get(QUEUE) == "research" and is_suspended(job))

    space.wait("compile is queued", lambda: queued("compile"))
    hold(space, client, "compile")
    queues.leave()
    first = uids(space.wait_for_training("llama"))

    queues.occupy("research", 100)
    # A worker told to end before Python has started ignores it, and is killed after its 120 s to save.
    space.wait("no worker", lambda: not first & uids(space.pods("llama", "train")))
    assert queued("train")
    hold(space, client, "train")
    queues.leave()
    assert not first & uids(space.wait_for_training("llama"))
    space.volume.run("touch continue")
    result = client.wait()
    assert result.status == 0 and llama.state == "deployed", result.output

    for stage in ("compile", "train"):
        states = [
            one.item
            for one in space.history.sightings
            if one.item["kind"] == workload_for(workload).name and is_stage(one.item, stage)
        ]
        assert {labels_of(job).get(PRIORITY) for job in states} == {queues.priority(1)}
        released = [FINGERPRINT in annotations_of(job) for job in states]
        assert [labels_of(job).get(QUEUE) == "research" for job in states] == released
        assert set(released) == {False, True}


@pytest.mark.parametrize("workload", ["pytorchjob", pytest.param("trainjob", marks=pytest.mark.repeat)])
def test_a_default_queue_admits_nothing_that_its_gate_has_not_released(queues: Queues, workload: str) -> None:
    """Kueue puts new jobs without a queue into the namespace's LocalQueue `default`: for a release without a queue, for
    one that has nothing to do, and for one with queues of its own for both kinds of stages."""
    space, kind = queues.space, workload_for(workload).name
    queues.local_queue("default")
    llama = space.release(3)
    llama.install(values(workload))
    began = time.monotonic()
    llama.upgrade(values(workload))
    assert asking_for_neuron(space, began) == set()

    for name in ("research", "processors"):
        queues.local_queue(name)
    began = time.monotonic()
    settings: Values = {"kueue": {"queueName": "research", "cpuQueueName": "processors"}, "lora": {"r": 2}}
    llama.upgrade(values(workload, settings))
    made = {
        (one.item["kind"], component_of(one.item)): name_of(one.item)
        for one in space.history.made_since(began)
        if one.item["kind"] in {"Job", kind} and component_of(one.item)
    }
    assert queue_of(space, kind, made[kind, "train"]) == "research"
    assert {queue_of(space, "Job", made["Job", stage]) for stage in ("tokenize", "merge")} == {"processors"}

    released = {name_of(job): version_of(job) for job in states(space, kind) if FINGERPRINT in annotations_of(job)}
    for pod in (one.item for one in space.history.sightings if one.item["kind"] == "Pod" and job_of(one.item)):
        assert version_of(pod) > released[job_of(pod)], f"{name_of(pod)} was there before its release"


def states(space: Space, kind: str) -> list[Object]:
    """Every state of the objects of a kind, the first one last."""
    return [one.item for one in reversed(space.history.sightings) if one.item["kind"] == kind]


def queue_of(space: Space, kind: str, name: str) -> str:
    return next(labels_of(job).get(QUEUE, "") for job in states(space, kind) if name_of(job) == name)


def version_of(item: Object) -> int:
    return int(item["metadata"]["resourceVersion"])


@pytest.fixture
def without_integrations() -> Iterator[None]:
    """As Kueue 0.19 is by default for PyTorchJobs."""
    try:
        operators.install_kueue(["batch/job"])
        yield
    finally:
        operators.install_kueue(FRAMEWORKS)


@pytest.mark.skipif(os.environ.get("KUBECONFIG") != str(node.KUBECONFIG), reason="changes Kueue's settings")
def test_without_the_integration_the_stage_fails_in_bounded_time_and_names_it(
    new_queues: Callable[[], Queues], without_integrations: None
) -> None:
    """For both APIs at once. No pod of compile starts."""
    releases: list[tuple[Release, str]] = []
    for workload in ("pytorchjob", "trainjob"):
        queues = new_queues()
        queues.local_queue("research")
        releases.append((queues.space.release(4), workload))
    clients = [
        release.start_install(values(workload, {"kueue": {"queueName": "research"}})) for release, workload in releases
    ]
    for (release, workload), client in zip(releases, clients, strict=True):
        ended = client.wait()
        assert ended.status != 0 and release.state == "failed"
        assert workload_for(workload).integration in ended.output, ended.output
        assert "integrations" in ended.output
        assert release.space.history.pods(**{COMPONENT: "compile"}) == []
