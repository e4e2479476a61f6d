"""A failed stage reports its reason at once, in the log that Helm prints; failures that a retry may fix are retried."""

from __future__ import annotations

import re
import time

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
    stand_in,
)
from genvalues.cluster.objects import (
    ContainerExit,
    condition,
    ends_of,
    name_of,
    unschedulable,
)
from genvalues.cluster.workloads import workload_for

WITHIN = 15.0  # seconds from a job's end to the release's
WORKER = "(?:worker|node-0)-"  # in the names of pods of a PyTorchJob and of a TrainJob, before the worker's number
BRIEF: Values = {"cleanup": {"enabled": False}, "evaluation": {"enabled": False}}
FOREVER = "sleep 600"
STOPPED = 143


def values(*more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), BRIEF, *more)


def on_worker_1(script: str) -> str:
    return f'case "$HOSTNAME" in *-worker-1|*-node-0-1) {script};; esac; {FOREVER}'


def ended(client: Client) -> tuple[Ended, float]:
    """How a client ended, and when (time.monotonic)."""
    result = client.wait()
    return result, time.monotonic()


def states_of(space: Space, job: str, worker: int) -> list[Object]:
    """Every state of the pods of one worker of a job."""
    name = re.compile(f"{job}-{WORKER}{worker}(-[a-z0-9]+)?")
    pods = (one.item for one in space.history.sightings if one.item["kind"] == "Pod")
    return [pod for pod in pods if name.fullmatch(name_of(pod))]


def starts_of(space: Space, job: str, worker: int) -> set[str]:
    """The ids of all containers that the worker has had."""
    return {
        status["containerID"]
        for pod in states_of(space, job, worker)
        for status in pod["status"].get("containerStatuses", [])
        if status.get("containerID")
    }


def ends_in(space: Space, job: str, worker: int) -> list[ContainerExit]:
    """How the containers of a worker have ended, in order."""
    states = states_of(space, job, worker)
    return sorted({end for state in states for end in ends_of(state)}, key=lambda end: end.finished)


def left(space: Space, stage: str) -> list[Object]:
    """Objects that hold a node or will do so."""
    jobs = [job for job in space.list("pytorchjobs") + space.list("trainjobs") if is_stage(job, stage)]
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


@pytest.mark.with_helm(3, 4)
def test_a_job_that_fails_fails_the_release_within_15_s_and_helm_prints_why(
    space: Space, helm: int, workload: str
) -> None:
    """Its controller ends it at its deadline, and deletes its pods with their logs."""
    llama = space.release(helm)
    settings = {"workload": workload, "stages": {"compile": {"activeDeadlineSeconds": 6}}}
    result, over = ended(llama.start_install(values(settings, compile=f"echo this takes too long; {FOREVER}")))
    assert result.status == 1 and llama.state == "failed"
    kind = workload_for(workload).name
    failed = space.history.first(lambda item: item["kind"] == kind and bool(condition(item, "Failed")))
    assert failed and over - failed < WITHIN
    why = {"pytorchjob": "Job llama-compile-1 has failed because it was active longer", "trainjob": "jobset failed"}
    assert_reported(
        llama,
        result,
        rf"compile failed: .*{kind} llama-compile-1: {why[workload]} .*",
        rf"last 1 lines of llama-compile-1-{WORKER}[01].*:",
        "this takes too long",
    )
    space.wait("no worker pod any more", lambda: not space.pods("llama", "compile"))


@pytest.mark.parametrize("workload", ["trainjob", pytest.param("pytorchjob", marks=pytest.mark.repeat)])
def test_status_2_of_one_worker_fails_at_once_and_another_is_retried_backoff_limit_times(
    space: Space, workload: str
) -> None:
    """The other worker keeps running, as one that waits for its peer does. The kubelet restarts a container within a
    second; after status 2 the job is deleted before the restarted container has any effect."""
    llama = space.release(4)
    why = "sleep 5; echo rows.jsonl has no column q; exit 2"
    own: Values = {"workload": workload}
    result, over = ended(llama.start_install(values(own, compile=on_worker_1(why))))
    assert result.status == 1
    failed = space.history.first(lambda item: item["kind"] == "Pod" and any(end.code == 2 for end in ends_of(item)))
    assert failed and over - failed < WITHIN
    assert_reported(
        llama,
        result,
        f"compile failed: llama-compile-1-{WORKER}1.* ended with status 2; .*",
        f"last 1 lines of llama-compile-1-{WORKER}1.*:",
        "rows.jsonl has no column q",
    )
    assert [end.code for end in ends_in(space, "llama-compile-1", 1) if end.code != STOPPED] == [2]
    assert len(starts_of(space, "llama-compile-1", 0)) == 1
    space.wait("the job and its pods are gone", lambda: not left(space, "compile"))

    settings = {"stages": {"compile": {"backoffLimit": 1}}}
    again = on_worker_1("sleep 1; echo again; exit 1")
    result, over = ended(llama.start_upgrade(values(own, settings, compile=again)))
    assert result.status == 1
    ends = ends_in(space, "llama-compile-2", 1)
    assert [end.code for end in ends] == [1, 1] and len(starts_of(space, "llama-compile-2", 1)) == 2
    failed = space.history.first(lambda item: item["kind"] == "Pod" and ends[-1] in ends_of(item))
    assert failed and over - failed < WITHIN
    assert_reported(
        llama,
        result,
        f"compile failed: .*llama-compile-2-{WORKER}1.* has failed 2 times .*",
        f"last 2 lines of llama-compile-2-{WORKER}1.*:",
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

    return f"http://{space.wait('the Hub', address)}:8000"


def test_a_revoked_token_of_the_hub_fails_the_stage_at_once_and_is_not_retried(space: Space) -> None:
    """With the real image: a Hub in the cluster rejects the token of the Secret."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": "hf_revoked"}}
    space.apply(secret)
    own: Values = {
        "model": {"path": "", "id": "org/thing"},
        "huggingFace": {"tokenSecret": "hub"},
        "stages": {"tokenize": {"extraEnv": {"HF_ENDPOINT": refusing_hub(space)}}},
    }
    settings = merged(SMALL, image(TRAINER_IMAGE), BRIEF, own)
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
    assert sum(len(starts_of(space, "llama-train-1", worker)) for worker in (0, 1)) == 1
    reason = (
        r"train failed: .*unschedulable for more than 10 s: llama-train-1-worker-[01]: 0/\d+ nodes are available: .*"
    )
    log = lines(space.log("job/llama-train-gate"))
    assert any(re.fullmatch(reason, line) for line in log), log
    assert any(re.fullmatch(reason, line) for line in printed(result))
    space.wait("nothing holds a node", lambda: not left(space, "train"))
