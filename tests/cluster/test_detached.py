"""Mode detached: no client is needed, the runner's Job has the outcome, and two trainings never run at once."""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import urllib3
import yaml
from kubernetes import client

from chart.manifests import CHART, Object, Values, merged
from cluster.local import node
from cluster.space import PATIENCE, Client, Space, helm_program, stand_in, succeeded, uids
from genvalues.cluster import config, runner
from genvalues.cluster.api import connect
from genvalues.cluster.failures import RETRY
from genvalues.cluster.helm_records import INNER_ENVIRONMENT
from genvalues.cluster.objects import COMPONENT, FINGERPRINT, annotations_of, condition, name_of
from genvalues.common.errors import EXIT_USER_ERROR

UNTIL_CONTINUE = "while [ ! -e /workspace/continue ]; do sleep 0.5; done"
DETACHED: Values = {"pipeline": {"mode": "detached"}, "evaluation": {"enabled": False}}


def detached(*more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), DETACHED, *more)


def outcome(space: Space, revision: int = 1) -> str:
    """How the runner's Job ended."""

    def ended() -> str | None:
        job = space.get("job", f"llama-runner-{revision}")
        return next((kind for kind in ("Complete", "Failed") if job and condition(job, kind)), None)

    return space.wait(f"the end of runner {revision}", ended)


def trainers(space: Space) -> set[str]:
    """Every train pod that has existed."""
    return uids(space.history.pods(**{COMPONENT: "train"}))


def test_install_returns_in_seconds_and_the_pipeline_continues_without_the_client_and_the_runners_pod(
    space: Space,
) -> None:
    llama = space.release(3)
    installed = llama.install(detached(train=UNTIL_CONTINUE))
    assert installed.seconds < 60
    first = uids(space.wait_for_training("llama-run"))
    [pod] = space.pods("llama", "runner")
    space.kubectl("delete", "pod", name_of(pod), "--force", "--grace-period=0")
    space.wait("a gate that follows", lambda: "following PyTorchJob" in space.log("job/llama-run-train-gate"))
    space.volume.run("touch continue")
    assert outcome(space) == "Complete"
    assert trainers(space) == first
    tested = llama("test", "llama", "--logs")
    assert tested.status == 0 and re.search(r"merge: .*all match the manifest", tested.output), tested.output


@pytest.mark.node
def test_the_pipeline_survives_an_outage_of_the_api_server_during_training(space: Space) -> None:
    space.release(4).install(detached(train=UNTIL_CONTINUE))
    first = uids(space.wait_for_training("llama-run"))
    node.restart_api_server(away=10)
    assert uids(space.wait_for_training("llama-run")) == first
    space.volume.run("touch continue")
    assert outcome(space) == "Complete"
    assert trainers(space) == first


def test_a_failed_stage_fails_the_runners_job_at_once_without_a_retry(space: Space) -> None:
    """Status 2, which is never retried, and another status after its retries."""
    llama = space.release(4)
    values = [
        detached(tokenize="echo no such column; exit 2"),
        detached({"stages": {"tokenize": {"backoffLimit": 0}}}, tokenize="echo no such column; exit 7"),
    ]
    for revision, install in enumerate([llama.install, llama.upgrade], 1):
        install(values[revision - 1])
        assert outcome(space, revision) == "Failed"
        reported = time.monotonic()
        of_stage = [one for one in list(space.history.sightings) if name_of(one.item) == "llama-run-tokenize"]
        failed = [one.at for one in of_stage if condition(one.item, "Failed")]
        assert reported - max(failed) < 15
        assert len(space.history.pods(**{"batch.kubernetes.io/job-name": f"llama-runner-{revision}"})) == 1
        log = space.log(f"job/llama-runner-{revision}")
        assert "no such column" in log and "pipeline: llama-run-tokenize failed: " in log, log


@pytest.mark.slow
def test_upgrade_follows_or_replaces_the_training_and_rollback_replaces_it_but_two_never_run_at_once(
    space: Space,
) -> None:
    llama = space.release(4)
    values = detached(train=UNTIL_CONTINUE)
    llama.install(values)
    first = uids(space.wait_for_training("llama-run"))
    fingerprint = train_fingerprint(space)

    llama.upgrade(values)
    space.wait("a gate that follows", lambda: "following PyTorchJob" in space.log("job/llama-run-train-gate"))
    assert trainers(space) == first

    llama.upgrade(merged(values, {"training": {"learningRate": 1e-3}}))
    space.wait("a training of its own", lambda: trainers(space) - first)
    second = uids(space.wait_for_training("llama-run"))
    assert not second & first and train_fingerprint(space) != fingerprint

    rolled_back = llama("rollback", "llama", "1", "--timeout", "3m")
    assert rolled_back.status == 0, rolled_back.output
    third = uids(space.wait_for_training("llama-run"))
    assert not third & (first | second)
    space.volume.run("touch continue")
    space.wait("the end of training", lambda: succeeded(space.get("job", "llama-run-train-gate") or {}))
    assert name_of(*space.list("jobs", f"{COMPONENT}=runner")) == "llama-runner-1"  # created again
    assert space.volume.manifest("llama", "train")["fingerprint"] == fingerprint
    assert space.history.trainings_at_once() == 1


def train_fingerprint(space: Space) -> str:
    [job] = [job for job in space.list("pytorchjobs", f"{COMPONENT}=train") if FINGERPRINT in annotations_of(job)]
    return annotations_of(job)[FINGERPRINT]


@pytest.mark.slow
def test_the_runners_role_grants_nothing_that_is_unused(space: Space, tmp_path: Path) -> None:
    """The runner works here, with its account's token, through a proxy that notes what the API server is asked for.

    A Helm client that is killed, one that takes over and sees a stage fail, one with a changed configuration. Listing
    PyTorchJobs is what Helm does before a watch where the API server (before 1.34) cannot do both at once.
    """
    compiling = f"{UNTIL_CONTINUE}; exit 2"
    nowhere: Values = {"stages": {"runner": {"nodeSelector": {"no-such": "node"}}}}
    space.release(4).install(detached(nowhere, compile=compiling))
    rendered = space.get("configmap", "llama-config")
    assert rendered
    for name, text in rendered["data"].items():
        (tmp_path / name).write_text(text)
    with recorder_for(space, "llama-runner") as recorder, ThreadPoolExecutor(1) as beside:
        kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{recorder.server_port}")
        environment = {**os.environ, **INNER_ENVIRONMENT, "KUBECONFIG": str(kubeconfig)}
        environment["HELM_MAX_HISTORY"] = "1"  # old records are deleted

        def run_helm(arguments: list[str]) -> int:
            space.clients.append(Client([str(helm_program(4)), *arguments], environment))
            return space.clients[-1].process.wait()

        def run_runner() -> int:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KUBECONFIG", str(kubeconfig))
                api = connect(space.name)
            settings = config.load(tmp_path / "cluster.yaml")
            values = tmp_path / "values.yaml"
            return runner.run(api, settings, CHART, values, "llama-runner-1", interval=1.0, run_helm=run_helm)

        killed = beside.submit(run_runner)
        space.wait_for_training("llama-run", stage="compile")
        space.clients[-1].kill()
        assert killed.result(PATIENCE) == RETRY
        fails = beside.submit(run_runner)
        space.wait("a gate that follows", lambda: "following PyTorchJob" in space.log("job/llama-run-compile-gate"))
        space.volume.run("touch continue")
        assert fails.result(PATIENCE) == EXIT_USER_ERROR
        changed = yaml.safe_load((tmp_path / "values.yaml").read_text())
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(merged(changed, {"lora": {"r": 2}})))
        assert beside.submit(run_runner).result(PATIENCE) == EXIT_USER_ERROR
    [role] = space.list("roles", f"{COMPONENT}=runner")
    moves = ("delete", "secrets")  # of an earlier version of the chart: see the next test
    unused = granted(role) - recorder.asked - {("list", "pytorchjobs.kubeflow.org"), moves}
    assert not unused, " ".join(map(str, sorted(unused)))


@pytest.mark.slow
def test_upgrade_takes_over_an_inner_release_whose_records_are_secrets(space: Space) -> None:
    """As an earlier version of the chart kept them. The training goes on, and uninstall leaves nothing.

    With NetworkPolicies, which the local cluster accepts, but whose network plugin does not enforce.
    """
    llama = space.release(4)
    values = detached({"networkPolicy": {"enabled": True}}, train=UNTIL_CONTINUE)
    llama.install(values)
    first = uids(space.wait_for_training("llama-run"))
    for record in space.list("configmaps", "owner=helm,name=llama-run"):
        content = base64.b64encode(record["data"]["release"].encode()).decode()
        metadata = {"name": name_of(record), "namespace": space.name, "labels": record["metadata"]["labels"]}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "helm.sh/release.v1"}
        space.apply({**secret, "data": {"release": content}})
        space.kubectl("delete", "configmap", name_of(record))
    llama.upgrade(values)
    space.wait("a gate that follows", lambda: "following PyTorchJob" in space.log("job/llama-run-train-gate"))
    assert trainers(space) == first
    assert not space.list("secrets", "owner=helm,name=llama-run")
    assert "llama-workers" in space.kubectl("get", "networkpolicies", "-o", "name")
    revisions = {record["metadata"]["labels"]["version"] for record in space.list("configmaps", "owner=helm")}
    assert revisions == {"1", "2"}, "not installed anew"
    llama.uninstall()
    assert not space.list("configmaps", "owner=helm") + space.list("secrets", "owner=helm")
    assert not space.kubectl("get", "networkpolicies", "-o", "name").strip()


def granted(role: Object) -> set[tuple[str, str]]:
    return {
        (verb, f"{resource}.{group}" if group else resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


OF_A_NAMESPACE = re.compile(r"/(?:api|apis/([^/]+))/[^/]+/namespaces/[^/]+/([^/]+)(?:/([^/]+)(?:/([^/]+))?)?$")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Recorder(ThreadingHTTPServer):
    """Forwards requests to the API server with a token, and records the verb and resource of each."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        settings = client.Configuration.get_default_copy()
        self.server = settings.host
        self.token = token
        self.pool = urllib3.PoolManager(ca_certs=settings.ssl_ca_cert, maxsize=20)
        self.asked: set[tuple[str, str]] = set()

    def note(self, method: str, target: str, status: int) -> None:
        url = urlsplit(target)
        if found := OF_A_NAMESPACE.match(url.path):  # the rest is discovery
            group, resource, name, part = found.groups()
            resource = f"{resource}/{part}" if part else resource
            resource = f"{resource}.{group}" if group else resource
            reading = "get" if name else "watch" if "watch=" in url.query else "list"
            self.asked.add((VERBS.get(method, reading), resource))
            if status == HTTPStatus.CREATED:  # also by server-side apply, which needs this permission
                self.asked.add(("create", resource))


class Passing(BaseHTTPRequestHandler):
    server: Recorder

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: self.headers[name] for name in ("Accept", "Content-Type") if name in self.headers}
        answer = self.server.pool.request(
            self.command,
            self.server.server + self.path,
            body=body,
            headers={**headers, "Authorization": f"Bearer {self.server.token}"},
            preload_content=False,
            timeout=600.0,
            retries=False,
        )
        self.server.note(self.command, self.path, answer.status)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.end_headers()
        with suppress(ConnectionError):  # the client has disconnected
            for piece in answer.stream(amt=None):
                self.wfile.write(piece)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def recorder_for(space: Space, account: str) -> Iterator[Recorder]:
    with Recorder(space.kubectl("create", "token", account).strip()) as recorder, ThreadPoolExecutor(1) as beside:
        beside.submit(recorder.serve_forever)
        try:
            yield recorder
        finally:
            recorder.shutdown()


def write_kubeconfig(path: Path, server: str) -> Path:
    context = {"cluster": "here", "user": "here"}
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "here", "cluster": {"server": server}}],
                "users": [{"name": "here", "user": {}}],
                "contexts": [{"name": "here", "context": context}],
            }
        )
    )
    return path
