"""A failed stage reports its reason at once, in the log that Helm prints; failures that a retry may fix are retried."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from chart.manifests import Object, Values, merged
from cluster.space import (
    SMALL,
    TRAINER_IMAGE,
    Client,
    Ended,
    Release,
    Space,
    image,
    is_stage,
    run,
    stand_in,
    uids,
)
from genvalues.cluster.objects import (
    ContainerExit,
    annotations_of,
    condition,
    ends_of,
    labels_of,
    name_of,
    unschedulable,
)
from genvalues.cluster.workloads import is_suspended

WITHIN = 15.0  # seconds from a job's end to the release's
BRIEF: Values = {"cleanup": {"enabled": False}, "evaluation": {"enabled": False}}
FOREVER = "sleep 600"
STOPPED = 143
QUEUE = "kueue.x-k8s.io/queue-name"
LOCAL_QUEUES = "localqueues.kueue.x-k8s.io"


def values(*more: Values, **scripts: str) -> Values:
    """Without devices: other tests may hold them all, and these tests measure time."""
    return {**merged(stand_in(**scripts), BRIEF, *more), "devices": {}}


def on_worker_1(script: str) -> str:
    return f'case "$HOSTNAME" in *-worker-1) {script};; esac; {FOREVER}'


def ended(client: Client) -> tuple[Ended, float]:
    """How a client ended, and when (time.monotonic)."""
    result = client.wait(200)
    return result, time.monotonic()


def starts_of(space: Space, pod: str) -> set[str]:
    """The ids of all containers that the pod has had."""
    states = [one.item for one in space.history.sightings if one.item["kind"] == "Pod" and name_of(one.item) == pod]
    return {
        status["containerID"]
        for pod in states
        for status in pod["status"].get("containerStatuses", [])
        if status.get("containerID")
    }


def ends_in(space: Space, pod: str) -> list[ContainerExit]:
    """How the containers of a pod have ended, in order."""
    states = [one.item for one in space.history.sightings if one.item["kind"] == "Pod" and name_of(one.item) == pod]
    return sorted({end for state in states for end in ends_of(state)}, key=lambda end: end.finished)


def left(space: Space, stage: str) -> list[Object]:
    """Objects that hold a node or will do so."""
    jobs = [job for job in space.list("pytorchjobs") if is_stage(job, stage)]
    return jobs + space.pods("llama", stage)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def printed(result: Ended) -> list[str]:
    """The lines that Helm printed. Helm 4 prints a hook's log in one line of its own log: msg="one\\ntwo\\n"."""
    return lines(re.sub(r'^level=INFO msg="(.*)"$', r"\1", result.output, flags=re.MULTILINE).replace(r"\n", "\n"))


def assert_reported(release: Release, result: Ended, *patterns: str) -> None:
    """The gate's log ends with these lines, and Helm has printed it."""
    log = lines(release.space.log(f"job/{release.name}-compile-gate"))
    assert len(log) >= len(patterns)
    for line, pattern in zip(log[-len(patterns) :], patterns, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"
    assert [line for line in printed(result) if line in log] == log, f"not the gate's log:\n{result.output}"


def test_a_pytorchjob_that_fails_fails_the_release_within_15_s_and_helm_prints_why(space: Space, helm: int) -> None:
    """The operator ends it at its deadline, and deletes its pods with their logs."""
    llama = space.release(helm)
    settings = {"stages": {"compile": {"activeDeadlineSeconds": 6}}}
    result, over = ended(llama.start_install(values(settings, compile=f"echo this takes too long; {FOREVER}")))
    assert result.status == 1 and llama.state == "failed"
    failed = space.history.first(lambda item: item["kind"] == "PyTorchJob" and bool(condition(item, "Failed")))
    assert failed and over - failed < WITHIN
    assert_reported(
        llama,
        result,
        r"compile failed: .*PyTorchJob llama-compile-1: Job llama-compile-1 has failed because it was active longer .*",
        r"last 1 lines of llama-compile-1-worker-[01]:",
        "this takes too long",
    )
    space.wait("no worker pod any more", lambda: not space.pods("llama", "compile"), 20)


def test_status_2_of_one_worker_fails_at_once_and_another_is_retried_backoff_limit_times(space: Space) -> None:
    """The other worker keeps running, as one that waits for its peer does. The kubelet restarts a container within a
    second; after status 2 the job is deleted before the restarted container has any effect."""
    llama = space.release(4)
    why = "sleep 5; echo rows.jsonl has no column q; exit 2"
    result, over = ended(llama.start_install(values(compile=on_worker_1(why))))
    assert result.status == 1
    failed = space.history.first(lambda item: item["kind"] == "Pod" and any(end.code == 2 for end in ends_of(item)))
    assert failed and over - failed < WITHIN
    assert_reported(
        llama,
        result,
        "compile failed: llama-compile-1-worker-1 ended with status 2; .*",
        "last 1 lines of llama-compile-1-worker-1:",
        "rows.jsonl has no column q",
    )
    assert [end.code for end in ends_in(space, "llama-compile-1-worker-1") if end.code != STOPPED] == [2]
    assert len(starts_of(space, "llama-compile-1-worker-0")) == 1
    space.wait("the job and its pods are gone", lambda: not left(space, "compile"), 20)

    settings = {"stages": {"compile": {"backoffLimit": 1}}}
    result, over = ended(llama.start_upgrade(values(settings, compile=on_worker_1("sleep 1; echo again; exit 1"))))
    assert result.status == 1
    worker = "llama-compile-2-worker-1"
    ends = ends_in(space, worker)
    assert [end.code for end in ends] == [1, 1] and len(starts_of(space, worker)) == 2
    failed = space.history.first(lambda item: item["kind"] == "Pod" and ends[-1] in ends_of(item))
    assert failed and over - failed < WITHIN
    assert_reported(
        llama,
        result,
        f"compile failed: .*{worker} has failed 2 times .*",
        f"last 2 lines of {worker}:",
        "again",
        "again",
    )


def test_status_2_of_a_stage_fails_at_once_and_another_is_retried_backoff_limit_times(space: Space) -> None:
    llama = space.release(3)
    result, over = ended(llama.start_install(values(tokenize="echo no such column; exit 2")))
    assert result.status == 1 and "no such column" in printed(result)
    [pod] = space.history.pods(**{"app.kubernetes.io/component": "tokenize"})
    assert [end.code for end in ends_of(pod)] == [2]
    failed = space.history.first(
        lambda item: item["kind"] == "Pod" and bool(ends_of(item)) and is_stage(item, "tokenize")
    )
    assert failed and over - failed < WITHIN

    settings = {"stages": {"tokenize": {"backoffLimit": 1}}}
    result = llama.upgrade(values(settings, tokenize="echo the disk is full; exit 1"), status=1)
    assert "the disk is full" in printed(result)
    pods = space.history.pods(**{"app.kubernetes.io/component": "tokenize"})
    assert [[end.code for end in ends_of(each)] for each in pods] == [[2], [1], [1]]


def test_status_75_of_a_volume_is_retried_and_then_fails_the_stage_with_its_line(space: Space) -> None:
    """The pause before the retry: tests/trainer/test_failures.py."""
    full = "/workspace/runs: cannot be written: No space left on device"
    settings = {"stages": {"tokenize": {"backoffLimit": 1}}}
    result = space.release(3).install(values(settings, tokenize=f"echo {full}; exit 75"), status=1)
    assert full in printed(result)
    pods = space.history.pods(**{"app.kubernetes.io/component": "tokenize"})
    assert [[end.code for end in ends_of(each)] for each in pods] == [[75], [75]]


REFUSE = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Refuse(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
HTTPServer(("", 8000), Refuse).serve_forever()
"""


def refusing_hub(space: Space) -> str:
    """Start a Hub that refuses every token; its URL."""
    container = {
        "name": "hub",
        "image": TRAINER_IMAGE,
        "command": ["python3", "-c", REFUSE],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 1}
    space.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hub"}, "spec": spec})

    def address() -> str | None:
        pod = space.get("pod", "hub")
        running = pod and all(each["ready"] for each in pod["status"].get("containerStatuses") or [{"ready": False}])
        return str(pod["status"]["podIP"]) if pod and running else None

    return f"http://{space.wait('the Hub', address, 120)}:8000"


def test_a_revoked_token_of_the_hub_fails_the_stage_at_once_and_is_not_retried(space: Space) -> None:
    """With the real image: a Hub in the cluster rejects the token of the Secret."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": "hf_revoked"}}
    space.apply(secret)
    own: Values = {
        "model": {"path": "", "id": "org/thing"},
        "huggingFace": {"tokenSecret": "hub"},
        "stages": {"tokenize": {"extraEnv": {"HF_ENDPOINT": refusing_hub(space)}}},
    }
    settings = {**merged(SMALL, image(TRAINER_IMAGE), BRIEF, own), "devices": {}}
    result = space.release(3).install(settings, status=1)
    assert any("rejects the token" in line and "Create a new token" in line for line in printed(result)), result.output
    [pod] = space.history.pods(**{"app.kubernetes.io/component": "tokenize"})
    assert [end.code for end in ends_of(pod)] == [2]
    assert "hf_revoked" not in result.output


def test_an_unschedulable_train_pod_fails_the_stage_with_the_schedulers_reason_and_frees_the_other_node(
    space: Space,
) -> None:
    """One worker runs and holds its node; the other needs a second node. Compile's workers share the node."""
    apart = {
        "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "train"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    settings: Values = {
        "pipeline": {"unschedulableTimeoutSeconds": 10},
        "stages": {
            "train": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}}
        },
    }
    llama = space.release(3)
    result, over = ended(llama.start_install(values(settings, train=FOREVER)))
    assert result.status == 1
    lacking = space.history.first(lambda item: item["kind"] == "Pod" and bool(unschedulable(item)))
    assert lacking and 10 <= over - lacking < 10 + WITHIN
    assert len(starts_of(space, "llama-train-1-worker-0")) + len(starts_of(space, "llama-train-1-worker-1")) == 1
    reason = (
        r"train failed: .*unschedulable for more than 10 s: llama-train-1-worker-[01]: 0/\d+ nodes are available: .*"
    )
    log = lines(space.log("job/llama-train-gate"))
    assert any(re.fullmatch(reason, line) for line in log), log
    assert any(re.fullmatch(reason, line) for line in printed(result))
    space.wait("nothing holds a node", lambda: not left(space, "train"), 20)


@pytest.fixture
def queue_kind() -> Iterator[None]:
    """The kind LocalQueue without Kueue: the test unsuspends the jobs."""
    group, plural = LOCAL_QUEUES.split(".", 1)[1], LOCAL_QUEUES.split(".", 1)[0]
    kind = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": LOCAL_QUEUES},
    }
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    kind["spec"] = {
        "group": group,
        "scope": "Namespaced",
        "names": {"plural": plural, "singular": "localqueue", "kind": "LocalQueue"},
        "versions": [{"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
    }
    there = run(["kubectl", "get", "crd", LOCAL_QUEUES]).status == 0
    if not there:
        assert run(["kubectl", "apply", "-f", "-"], text=json.dumps(kind)).status == 0
    yield
    if not there:
        run(["kubectl", "delete", "crd", LOCAL_QUEUES, "--wait=false"])


def test_queued_and_preempted_jobs_are_waited_for(space: Space, queue_kind: None) -> None:
    """The test acts as Kueue: it suspends a queued job, unsuspends it, and preempts it."""
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "research"}}
    space.wait("the kind LocalQueue", lambda: applied(space, queue))
    settings = {
        "kueue": {"queueName": "research", "priorityClass": "urgent"},
        "pipeline": {"unschedulableTimeoutSeconds": 5},
    }
    llama = space.release(4)
    client = llama.start_install(values(settings, train="until [ -e /workspace/continue ]; do sleep 0.2; done"))

    space.wait("compile is queued", lambda: queued(space, "llama-compile-1"))
    suspend(space, "llama-compile-1", False)
    space.wait("train is queued", lambda: queued(space, "llama-train-1"))
    hold(space, client, "train")
    suspend(space, "llama-train-1", False)
    first = uids(space.wait_for_training("llama"))
    suspend(space, "llama-train-1")
    # A worker told to end before Python has started ignores it, and is killed after its 120 s to save.
    space.wait("no train pod", lambda: not space.pods("llama", "train"), 150)
    hold(space, client, "train")
    suspend(space, "llama-train-1", False)
    assert not first & uids(space.wait_for_training("llama"))
    space.volume.run("touch continue")
    result = client.wait(120)
    assert result.status == 0 and llama.state == "deployed", result.output

    for stage in ("compile", "train"):
        states = [
            one.item
            for one in space.history.sightings
            if one.item["kind"] == "PyTorchJob" and is_stage(one.item, stage)
        ]
        assert {labels_of(job).get("kueue.x-k8s.io/priority-class") for job in states} == {"urgent"}
        released = ["llama-lora/fingerprint" in annotations_of(job) for job in states]
        assert [QUEUE in labels_of(job) for job in states] == released and set(released) == {False, True}


def applied(space: Space, item: Object) -> bool:
    return "created" in space.kubectl("create", "-f", "-", text=json.dumps(item), check=False)


def queued(space: Space, name: str) -> bool:
    job = space.get("pytorchjob", name)
    return bool(job and labels_of(job).get(QUEUE) == "research" and is_suspended(job))


def suspend(space: Space, name: str, wish: bool = True) -> None:
    patch = {"spec": {"runPolicy": {"suspend": wish}}}
    space.kubectl("patch", "pytorchjob", name, "--type=merge", "--patch", json.dumps(patch))


def hold(space: Space, client: Client, stage: str) -> None:
    """Wait for longer than a pod may stay unschedulable."""
    space.never(f"{stage} did not wait for its queue", lambda: not client.is_alive() or space.pods("llama", stage), 9)


def test_pods_that_train_are_not_disrupted_and_have_120_s_to_save(space: Space) -> None:
    llama = space.release(3)
    client = llama.start_install(values(compile="sleep 2", train=FOREVER))
    for stage in ("compile", "train"):
        for pod in space.wait_for_training("llama", stage=stage):
            assert annotations_of(pod)["karpenter.sh/do-not-disrupt"] == "true"
            assert pod["spec"]["terminationGracePeriodSeconds"] == 120
    assert client.is_alive()
