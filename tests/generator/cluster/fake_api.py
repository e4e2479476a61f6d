"""A Kubernetes API server for tests: HTTP for the real client, objects in a dict.

It has no controllers: tests act as the operator, the kubelet and the scheduler by changing objects."""

from __future__ import annotations

import copy
import itertools
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Object = dict[str, Any]
NAMESPACE = "team-a"
GROUPS = {
    "pytorchjobs": "kubeflow.org/v1",
    "trainjobs": "trainer.kubeflow.org/v1alpha1",
    "trainingruntimes": "trainer.kubeflow.org/v1alpha1",
    "jobs": "batch/v1",
    "storageclasses": "storage.k8s.io/v1",
    **dict.fromkeys(("localqueues", "workloads", "clusterqueues", "workloadpriorityclasses"), "kueue.x-k8s.io/v1beta1"),
}
CUSTOM = {"pytorchjobs": "PyTorchJob", "trainjobs": "TrainJob", "trainingruntimes": "TrainingRuntime"}  # sent as kind
OPTIONAL = {*CUSTOM, "localqueues"}  # served only if the test adds them to crds
CLUSTER_SCOPED = {"nodes", "namespaces", "storageclasses", "clusterqueues", "workloadpriorityclasses"}
PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/v1(?:alpha1|beta1)?)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>log))?"
)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class FakeApi:
    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}  # by plural and name
        self.logs: dict[str, list[str]] = {}  # by pod: lines, to which tests append
        self.previous_logs: dict[str, list[str]] = {}  # by pod: of the container before its restart
        self.crds = {"pytorchjobs"}  # the custom kinds of GROUPS that are served
        self.forbidden: set[tuple[str, str]] = set()  # verb, resource
        self.denied: dict[tuple[str, str], str] = {}  # verb, plural: message of an admission webhook
        self.requests: list[tuple[str, str]] = []  # verb, resource as in an RBAC rule
        self.paths: list[str] = []
        self.away = False
        self.after: list[tuple[str, str, Callable[[Object], None]]] = []  # verb, plural, the reaction of the cluster
        self.changes: list[tuple[str, str, Object]] = []  # type, plural, object: sent to watches
        self.graceful = False  # pods of a deleted job get a deletionTimestamp and stay until the test removes them
        self.version: Object | None = None  # of the server
        self.default_queue = False  # Kueue and a LocalQueue named default: no job loses its queue
        self.failing: dict[str, str] = {}  # by verb: message of a webhook that does not respond
        self.nonsense: tuple[int, str] | None = None  # status and body of every response: not an API server
        self.drips = False  # every response is headers and then one space after another
        self.connections: set[socket.socket] = set()  # open ones
        self._versions = itertools.count(1)
        self._lock = threading.RLock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 65536  # one packet per response; two would wait 40 ms for an acknowledgement

            def setup(self) -> None:
                super().setup()
                fake.connections.add(self.connection)

            def finish(self) -> None:
                fake.connections.discard(self.connection)
                super().finish()

            def log_message(self, *_: Any) -> None: ...

            def handle_any(self) -> None:
                if fake.away:
                    self.close_connection = True
                    with suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                length = int(self.headers.get("Content-Length") or 0)
                fake.answer(self, json.loads(self.rfile.read(length)) if length else None)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        class Server(ThreadingHTTPServer):
            def handle_error(self, *request: Any) -> None:
                # A connection that its client, or the end of the test, has closed would print a traceback into the
                # output of whatever test runs then.
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(*request)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    # Called by tests.

    def add(self, plural: str, item: Object) -> Object:
        with self._lock:
            item = copy.deepcopy(item)
            if plural in CUSTOM:
                item["kind"] = CUSTOM[plural]
            meta = item.setdefault("metadata", {})
            meta.setdefault("creationTimestamp", now())
            meta["uid"] = f"uid-{next(self._versions)}"
            self.objects[plural, meta["name"]] = item
            self._changed("ADDED", plural, item)
            return item

    def get(self, plural: str, name: str) -> Object | None:
        with self._lock:
            return copy.deepcopy(self.objects.get((plural, name)))

    def names(self, plural: str) -> list[str]:
        with self._lock:
            return sorted(name for kind, name in self.objects if kind == plural)

    def merge(self, plural: str, name: str, patch: Object) -> Object:
        with self._lock:
            item = merged(self.objects[plural, name], patch)
            self.objects[plural, name] = item
            self._changed("MODIFIED", plural, item)
            return item

    def remove(self, plural: str, name: str) -> None:
        with self._lock:
            item = self.objects.pop((plural, name), None)
            if item:
                self._changed("DELETED", plural, item)

    def set_condition(self, plural: str, name: str, kind: str, message: str = "", reason: str = "") -> None:
        """Add a True condition; Succeeded and Failed flip Running to False, as the operator does."""
        with self._lock:
            conditions = self.objects[plural, name].get("status", {}).get("conditions", [])
            for one in conditions:
                if one["type"] == "Running" and kind in {"Succeeded", "Failed"}:
                    one["status"] = "False"
            added = {"type": kind, "status": "True", "message": message, "reason": reason, "lastTransitionTime": now()}
            self.merge(plural, name, {"status": {"conditions": [*conditions, added]}})

    def _changed(self, change: str, plural: str, item: Object) -> None:
        item["metadata"]["resourceVersion"] = str(next(self._versions))
        self.changes.append((change, plural, copy.deepcopy(item)))

    # The server.

    def answer(self, handler: BaseHTTPRequestHandler, body: Object | None) -> None:
        url = urlsplit(handler.path)
        query = dict(parse_qsl(url.query))
        self.paths.append(url.path)
        if self.nonsense:
            return reply(handler, *self.nonsense)
        if self.drips:
            return self._drip(handler)
        if document := self._discovery(url.path):
            return reply(handler, 200, document)
        found = PATH.fullmatch(url.path)
        plural, name, sub = (found["plural"], found["name"], found["sub"]) if found else ("", None, None)
        if not found or (plural in OPTIONAL and plural not in self.crds):
            return reply(handler, 404, "404 page not found\n")
        verbs = {
            "GET": "get" if name else "list",
            "POST": "create",
            "PUT": "update",
            "PATCH": "patch",
            "DELETE": "delete",
        }
        verb = "watch" if query.get("watch") else verbs[handler.command]
        group = found["group"]
        resource = (f"{plural}.{group}" if group else plural) + (f"/{sub}" if sub else "")
        self.requests.append((verb, resource))
        if (found["namespace"] is None) != (plural in CLUSTER_SCOPED):
            return refuse(handler, 403, f"cannot {verb} {resource} at the cluster scope")
        if (verb, resource) in self.forbidden:
            return refuse(handler, 403, f'User "sa" cannot {verb} resource "{resource}" in namespace "{NAMESPACE}"')
        if (verb, plural) in self.denied:
            return refuse(handler, 422, self.denied[verb, plural])
        if verb in self.failing:
            return refuse(handler, 500, self.failing[verb])
        if verb == "watch":
            return self._watch(handler, plural, query)
        if verb == "list":
            with self._lock:
                items = [item for (kind, _), item in self.objects.items() if kind == plural and matches(item, query)]
                version = str(next(self._versions))
                return reply(handler, 200, {"items": items, "metadata": {"resourceVersion": version}})
        return self._one(handler, verb, plural, name or "", sub, body, query)

    def _one(
        self,
        handler: BaseHTTPRequestHandler,
        verb: str,
        plural: str,
        name: str,
        sub: str | None,
        body: Object | None,
        query: dict[str, str],
    ) -> None:
        if verb == "create":
            assert body is not None
            if (plural, body["metadata"]["name"]) in self.objects:
                return refuse(handler, 409, "already exists")
            item = self.add(plural, body)
        elif (plural, name) not in self.objects:
            return refuse(handler, 404, f'{plural} "{name}" not found')
        elif sub == "log":
            return self._log(handler, name, query)
        elif verb == "patch":
            assert handler.headers["Content-Type"] == "application/merge-patch+json"
            changed = ((body or {}).get("metadata") or {}).get("labels") or {}
            if self.default_queue and changed.get("kueue.x-k8s.io/queue-name", "") is None:
                denied = "queue-name must not be empty in namespace with default queue"
                return refuse(handler, 403, f'admission webhook "vpytorchjob.kb.io" denied the request: {denied}')
            item = self.merge(plural, name, body or {})
        elif verb == "update":
            assert body is not None
            if body["metadata"]["resourceVersion"] != self.objects[plural, name]["metadata"]["resourceVersion"]:
                return refuse(handler, 409, "the object has been modified")
            item = self.merge(plural, name, body)
        elif verb == "delete":
            item = self._delete(plural, name, (body or {}).get("propagationPolicy", ""))
        else:
            item = self.objects[plural, name]
        reply(handler, 200, item)
        for when, kind, act in list(self.after):
            if (when, kind) == (verb, plural):
                act(item)
        return None

    def _delete(self, plural: str, name: str, propagation: str) -> Object:
        """Foreground: the object stays, with a deletionTimestamp, until its pods have ended. Else all are removed."""
        with self._lock:
            item = self.objects[plural, name]
            owned = self.owned_by(item)
            if propagation == "Foreground" and owned:
                return self.merge(plural, name, {"metadata": {"deletionTimestamp": now()}})
            self.remove(plural, name)
            if propagation != "Orphan":
                for pod in owned:
                    if self.graceful:
                        self.merge("pods", pod, {"metadata": {"deletionTimestamp": now()}})
                    else:
                        self.remove("pods", pod)
            return item

    def owned_by(self, item: Object) -> list[str]:
        with self._lock:
            uid = item["metadata"]["uid"]
            return [
                name
                for (plural, name), pod in self.objects.items()
                if plural == "pods" and any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))
            ]

    def _discovery(self, path: str) -> Object | None:
        if path == "/version":
            return self.version
        if path == "/apis/kubeflow.org/v1" and "pytorchjobs" in self.crds:
            return {"resources": [{"name": "pytorchjobs"}, {"name": "pytorchjobs/status"}]}
        if path == "/apis/trainer.kubeflow.org/v1alpha1" and "trainjobs" in self.crds:
            return {"resources": [{"name": "trainjobs"}, {"name": "trainingruntimes"}]}
        if path == "/apis/kueue.x-k8s.io" and "localqueues" in self.crds:
            return {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta1"}}
        return None

    def _watch(self, handler: BaseHTTPRequestHandler, plural: str, query: dict[str, str]) -> None:
        seen = 0
        since = int(query["resourceVersion"])
        with streaming(handler) as send:
            while not self.away:
                for change, kind, item in self.changes[seen:]:
                    seen += 1
                    if kind == plural and int(item["metadata"]["resourceVersion"]) > since and matches(item, query):
                        send(json.dumps({"type": change, "object": item}))
                time.sleep(0.005)

    def _drip(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            while not self.away:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.01)

    def _log(self, handler: BaseHTTPRequestHandler, pod: str, query: dict[str, str]) -> None:
        """Send the lines so far, then new ones until the container ends or the pod is deleted, as a kubelet does."""
        assert query["timestamps"] == "true"
        if query.get("previous") and pod not in self.previous_logs:
            return refuse(handler, 400, f'previous terminated container in pod "{pod}" not found')
        lines = self.previous_logs[pod] if query.get("previous") else self.logs.setdefault(pod, [])
        sent = max(0, len(lines) - int(query.get("tailLines", len(lines))))
        with streaming(handler) as send:
            while not self.away:
                item = self.get("pods", pod)
                statuses = (item or {}).get("status", {}).get("containerStatuses", [])
                running = any("running" in status["state"] for status in statuses)
                while sent < len(lines):
                    send(f"2025-01-01T00:00:00.{sent:09d}Z {lines[sent]}")
                    sent += 1
                if not running or not query.get("follow"):
                    return None
                time.sleep(0.005)
        return None


@contextmanager
def streaming(handler: BaseHTTPRequestHandler) -> Iterator[Callable[[str], None]]:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()

    def send(line: str) -> None:
        piece = f"{line}\n".encode()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.flush()

    with suppress(OSError):  # the client has disconnected
        yield send
        handler.wfile.write(b"0\r\n\r\n")


def reply(handler: BaseHTTPRequestHandler, status: int, answer: Object | str) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    with suppress(OSError):
        handler.send_response(status)
        handler.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())


def refuse(handler: BaseHTTPRequestHandler, status: int, message: str) -> None:
    reply(handler, status, {"kind": "Status", "code": status, "message": message})


def merged(item: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(item) if isinstance(item, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def matches(item: Object, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    wanted = re.findall(r"([^,=\s]+) in \(([^)]*)\)|([^,=\s]+)=([^,]*)", query.get("labelSelector", ""))
    for key_in, values, key, value in wanted:
        if (labels.get(key_in) not in values.split(",")) if key_in else (labels.get(key) != value):
            return False
    for field in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = field.partition("=")
        found: Any = item
        for part in path.split("."):
            found = found.get(part, {})
        if found != value:
            return False
    return True


def write_kubeconfig(file: Path, url: str) -> None:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "fake", "user": {"token": "fake"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
    }
    file.write_text(json.dumps(content))


@contextmanager
def serving(folder: Path) -> Iterator[tuple[FakeApi, Path]]:
    """Run the server; yields it and a kubeconfig for it."""
    fake = FakeApi()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    kubeconfig = folder / "kubeconfig"
    write_kubeconfig(kubeconfig, fake.url)
    try:
        yield fake, kubeconfig
    finally:
        fake.away = True
        fake.server.shutdown()
        fake.server.server_close()
        for connection in list(fake.connections):  # kept alive by clients
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
