"""The edge to the Kubernetes API: a few verbs over the official client, patient with a server that is away.

Objects go in and out as plain dicts. Requests are sent through the client's dynamic ``request``, whose form is the
same in every version we allow; nothing is discovered or cached.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import urllib3
import yaml
from kubernetes import client, config, dynamic
from kubernetes.utils.quantity import parse_quantity

from genvalues.common.errors import UserError

Object = dict[str, Any]
Query = list[tuple[str, Any]]

# Seen: an API server that restarts is away for 40 to 77 s (local-cluster/README.md).
PATIENCE_SECONDS = 300.0
TRANSPORT_ERRORS = (OSError, ValueError, urllib3.exceptions.HTTPError)  # ValueError: half an answer
AWAY = {0, 408, 429, 500, 502, 503, 504}  # 0: the client's own word for a TLS failure
# What the client makes of a file that is no kubeconfig, and of one that is not there.
NO_KUBECONFIG = (config.ConfigException, yaml.YAMLError, OSError, AttributeError, KeyError, TypeError, ValueError)
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_SECONDS, READ_SECONDS = 5.0, 20.0
WATCH_SECONDS = 50  # the server ends a watch after this; a connection that died without a word is noticed soon after
QUIET_LOG_SECONDS = 300.0  # a log may say nothing for long, e.g. while neuronx-cc compiles


class Kind(NamedTuple):
    api: str
    plural: str
    namespaced: bool = True

    def __str__(self) -> str:
        """As RBAC rules and kubectl name it: pods, jobs.batch."""
        group = self.api.split("/")[1] if self.api.startswith("apis/") else ""
        return f"{self.plural}.{group}" if group else self.plural


PODS = Kind("api/v1", "pods")
EVENTS = Kind("api/v1", "events")
SECRETS = Kind("api/v1", "secrets")
CLAIMS = Kind("api/v1", "persistentvolumeclaims")
QUOTAS = Kind("api/v1", "resourcequotas")
NODES = Kind("api/v1", "nodes", namespaced=False)
NAMESPACES = Kind("api/v1", "namespaces", namespaced=False)
JOBS = Kind("apis/batch/v1", "jobs")
STORAGE_CLASSES = Kind("apis/storage.k8s.io/v1", "storageclasses", namespaced=False)
PYTORCH_JOBS = Kind("apis/kubeflow.org/v1", "pytorchjobs")


class ApiError(Exception):
    """The API server refused a request."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


class NotAllowed(ApiError):
    """RBAC does not let us do this."""


class ServerAway(ApiError):
    """No usable answer for as long as we were willing to wait."""


class Api:
    """One namespace of one cluster. Safe to use from several threads."""

    def __init__(
        self,
        dynamic_client: Any,
        namespace: str,
        *,
        patience: float = PATIENCE_SECONDS,
        interval: float = 2.0,
        deadline: float | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.namespace = namespace
        self._client = dynamic_client
        self._patience = patience
        self._interval = interval
        self._deadline = deadline  # of time.monotonic(): no request goes on after it
        self._say = say
        self._worked: set[tuple[str, str]] = set()

    def get(self, kind: Kind, name: str) -> Object | None:
        """The object, or None when there is none."""
        return self._found(lambda: self._json("GET", self._path(kind, name), kind))

    def list(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[Object]:
        """What matches the selectors; nothing when the API does not know the kind (a CRD that is not installed)."""
        listed = self._found(lambda: self._json("GET", self._path(kind), kind, query=selectors(labels, fields)))
        return listed["items"] if listed else []

    def create(self, kind: Kind, body: Object) -> None:
        """Create ``body``; one of that name that is there already is left as it is."""
        try:
            self._json("POST", self._path(kind), kind, body=body)
        except ApiError as error:
            if error.status != 409:
                raise

    def patch(self, kind: Kind, name: str, body: Object) -> Object | None:
        """Merge ``body`` into the object; None when it is gone."""
        return self._found(lambda: self._json("PATCH", self._path(kind, name), kind, body=body))

    def replace(self, kind: Kind, body: Object) -> bool:
        """Put ``body`` in the object's place; False when that has changed since it was read, or is gone."""
        try:
            self._json("PUT", self._path(kind, body["metadata"]["name"]), kind, body=body)
        except ApiError as error:
            if error.status in {404, 409}:
                return False
            raise
        return True

    def delete(self, kind: Kind, name: str, *, propagation: str = "Background") -> None:
        """Ask for the object's deletion; one that is gone is fine."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        self._found(lambda: self._json("DELETE", self._path(kind, name), kind, body=options))

    def discover(self, path: str) -> Object | None:
        """A discovery document, e.g. ``apis/kubeflow.org/v1``; None when the group is not served."""
        return self._found(lambda: self._json("GET", f"/{path}"))

    def watch(self, kind: Kind, *, labels: str) -> Iterator[Object]:
        """Each matching object as it is, then each one that changes or goes, until the server ends the watch."""
        listed = self._json("GET", self._path(kind), kind, query=selectors(labels))
        yield from listed["items"]
        since = listed.get("metadata", {}).get("resourceVersion", "")
        query = [*selectors(labels), ("watch", "true"), ("resourceVersion", since), ("timeoutSeconds", WATCH_SECONDS)]
        for line in self._lines(self._path(kind), query, WATCH_SECONDS + 15.0):
            change = json.loads(line)
            if change.get("type") in {"ADDED", "MODIFIED", "DELETED"}:
                yield change["object"]

    def log(
        self, pod: str, container: str, *, tail: int | None, follow: bool = True, previous: bool = False
    ) -> Iterator[str]:
        """The last ``tail`` lines of a container (None: all), each with its time in front; with ``follow`` all that
        come until it ends, too. ``previous``: of the container that was there before its restart."""
        query: Query = [("container", container), ("timestamps", "true")]
        query += [("follow", "true")] if follow else []
        query += [("previous", "true")] if previous else []
        query += [("tailLines", tail)] if tail is not None else []
        yield from self._lines(f"{self._path(PODS, pod)}/log", query, QUIET_LOG_SECONDS if follow else READ_SECONDS)

    def _path(self, kind: Kind, name: str = "") -> str:
        namespace = f"/namespaces/{self.namespace}" if kind.namespaced else ""
        return f"/{kind.api}{namespace}/{kind.plural}" + (f"/{name}" if name else "")

    def _found(self, ask: Callable[[], Object]) -> Object | None:
        try:
            return ask()
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _json(
        self,
        method: str,
        path: str,
        kind: Kind | None = None,
        *,
        query: Query | None = None,
        body: Object | None = None,
    ) -> Object:
        """Send until there is an answer, at most for our patience; a 4xx is an answer."""
        until = time.monotonic() + self._patience
        if self._deadline is not None:
            until = min(until, self._deadline)
        told = False
        while True:
            try:
                left = max(0.5, until - time.monotonic())
                response = self._send(method, path, query, body, (min(CONNECT_SECONDS, left), min(READ_SECONDS, left)))
                answer: Object = json.loads(response.data)
                self._worked.add((method, str(kind)))
                return answer
            except ApiError as error:
                # A server that has just come back refuses everybody for a moment, until it has read the RBAC rules.
                worked_before = isinstance(error, NotAllowed) and (method, str(kind)) in self._worked
                if error.status not in AWAY and not worked_before:
                    raise
                problem = error
            except TRANSPORT_ERRORS as error:
                problem = ApiError(0, f"{type(error).__name__}: {error}")
            if time.monotonic() + self._interval >= until:
                if isinstance(problem, NotAllowed):
                    raise problem
                raise ServerAway(problem.status, f"the API server does not answer: {problem.message}")
            if not told:
                self._say(f"the API server does not answer, trying again: {problem.message}")
                told = True
            time.sleep(self._interval)

    def _lines(self, path: str, query: Query, quiet: float) -> Iterator[str]:
        """A streamed answer, line by line. Ends, without an error, when the connection does; the caller asks again."""
        response = self._send("GET", path, query, None, (CONNECT_SECONDS, quiet))
        rest = b""
        try:
            for piece in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield line.decode("utf-8", "replace")
        except TRANSPORT_ERRORS:
            return
        finally:
            response.close()
        if rest:
            yield rest.decode("utf-8", "replace")

    def _send(
        self,
        method: str,
        path: str,
        query: Query | None,
        body: Object | None,
        timeout: tuple[float, float],
    ) -> Any:
        content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            return self._client.request(
                method.lower(),
                path,
                body=body,
                query_params=query or [],
                content_type=content_type,
                serialize=False,
                _request_timeout=timeout,
            )
        except client.ApiException as error:
            message = message_of(error)
            raise (NotAllowed if error.status in {401, 403} else ApiError)(error.status or 0, message) from error


def whole_number(quantity: Any) -> int:
    """A count that the API spells as a quantity: 16, or 1k."""
    return int(parse_quantity(quantity))


def selectors(labels: str = "", fields: str = "") -> Query:
    return [(key, value) for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value]


def message_of(error: Any) -> str:
    """The server's own sentence, without headers and JSON around it."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def connect(namespace: str | None, *, context: str | None = None, **options: Any) -> Api:
    """To the cluster that Helm would choose: of $KUBECONFIG, else of ~/.kube/config, else the one this pod runs in.

    Without a namespace it is the context's.
    """
    settings = client.Configuration()
    named = os.environ.get("KUBECONFIG")
    path = named or os.path.expanduser("~/.kube/config")  # noqa: PTH111 - Path's raises for a pod's user without a home
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not (context or named or Path(path).exists()):
            config.load_incluster_config(client_configuration=settings)
            namespace = namespace or POD_NAMESPACE.read_text(encoding="utf-8").strip()
        else:
            config.load_kube_config(path, context=context, client_configuration=settings)
            namespace = namespace or namespace_of(context, path)
    except NO_KUBECONFIG as error:
        look = "get-contexts" if context else "current-context"
        fix = f"Set KUBECONFIG, or try: kubectl config {look}"
        raise UserError(f"no cluster to talk to: {' '.join(str(error).split())}", fix=fix) from error
    settings.retries = False  # ours are slower and say so
    without_discovery = dynamic.DynamicClient(client.ApiClient(settings), discoverer=lambda client, cache: None)
    return Api(without_discovery, namespace, **options)


def namespace_of(context: str | None, path: str) -> str:
    contexts, chosen = config.list_kube_config_contexts(path)
    if context:
        chosen = next(one for one in contexts if one["name"] == context)
    return chosen["context"].get("namespace") or "default"
