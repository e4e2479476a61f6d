"""A small Kubernetes client: a few verbs over the official client, with retries while the API server is unavailable.

Objects are plain dicts. Requests are sent through the dynamic client's ``request``, which has the same signature in
every supported version of the client. Nothing is discovered or cached.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config, dynamic
from kubernetes.utils.quantity import parse_quantity
from urllib3.util.ssl_ import create_urllib3_context

from genvalues.cluster.kinds import CHECK_ADDRESS, PODS, ApiError, Kind, NotAllowed, Object, ServerAway
from genvalues.common.errors import MOST_CHARACTERS, UserError
from genvalues.common.text import is_web_address, one_line, redacted

log = logging.getLogger(__name__)

Query = list[tuple[str, Any]]

# An API server that restarts was unavailable for 40 to 77 s (measured on a single-node control plane).
PATIENCE_SECONDS = 300.0
# ValueError: a truncated response, or one of something that is not an API server
TRANSPORT_ERRORS = (OSError, ValueError, urllib3.exceptions.HTTPError)
UNAVAILABLE = {0, 408, 429, 500, 502, 503, 504}  # 0: the client's status for a TLS failure
# What the client raises for a missing or malformed kubeconfig.
INVALID_KUBECONFIG = (config.ConfigException, yaml.YAMLError, OSError, AttributeError, KeyError, TypeError, ValueError)
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_SECONDS, READ_SECONDS = 5.0, 20.0
BODY_SECONDS = 60.0  # for a whole response: READ_SECONDS starts again with every byte
WATCH_SECONDS = 50  # the server ends a watch after this time, so a dead connection is noticed soon after
CHANGES = ("ADDED", "MODIFIED", "DELETED")  # what a watch says of an object; it also sends BOOKMARK and ERROR
QUIET_LOG_SECONDS = 300.0  # a container may log nothing for minutes, e.g. while neuronx-cc compiles


class Api:
    """Client for one namespace of one cluster. Thread-safe.

    While the server is unavailable, a request is retried every ``interval`` seconds for at most ``patience`` seconds,
    and never past ``deadline`` (a time of ``time.monotonic()``).
    """

    def __init__(
        self,
        dynamic_client: Any,
        namespace: str,
        *,
        patience: float = PATIENCE_SECONDS,
        interval: float = 2.0,
        deadline: float | None = None,
    ) -> None:
        self.namespace = namespace
        self._client = dynamic_client
        self._patience = patience
        self._interval = interval
        self._deadline = deadline
        self._allowed_before: set[tuple[str, str]] = set()  # method and kind
        self._outage_logged = False

    def with_patience(self, seconds: float) -> Api:
        """A client of the same server that retries for at most this long."""
        return Api(self._client, self.namespace, patience=seconds, interval=self._interval, deadline=self._deadline)

    def get(self, kind: Kind, name: str) -> Object | None:
        """Return the object, or None if it does not exist."""
        return self._none_if_missing(lambda: self._request("GET", self._path(kind, name), kind))

    def list(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[Object]:
        """Return the objects that match the selectors; an empty list if the API does not serve the kind (no CRD)."""
        query = selectors(labels, fields)
        listed = self._none_if_missing(
            lambda: self._request("GET", self._path(kind), kind, query=query, expect=is_list)
        )
        return listed["items"] or [] if listed else []

    def create(self, kind: Kind, body: Object) -> None:
        """Create ``body``. An existing object of the same name is left unchanged."""
        try:
            self._request("POST", self._path(kind), kind, body=body)
        except ApiError as error:
            if error.status != 409:
                raise

    def patch(self, kind: Kind, name: str, body: Object) -> Object | None:
        """Merge ``body`` into the object. Return None if the object does not exist."""
        return self._none_if_missing(lambda: self._request("PATCH", self._path(kind, name), kind, body=body))

    def replace(self, kind: Kind, body: Object) -> bool:
        """Replace the object by ``body``. Return False if it was changed or deleted since it was read."""
        try:
            self._request("PUT", self._path(kind, body["metadata"]["name"]), kind, body=body)
        except ApiError as error:
            if error.status in {404, 409}:
                return False
            raise
        return True

    def delete(self, kind: Kind, name: str, *, propagation: str = "Background") -> None:
        """Request deletion of the object. An object that does not exist is not an error."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        path = self._path(kind, name)
        self._none_if_missing(lambda: self._request("DELETE", path, kind, body=options, expect=is_document))

    def discover(self, path: str) -> Object | None:
        """Return a discovery document, e.g. ``apis/kubeflow.org/v1``, or None if the group is not served."""
        return self._none_if_missing(lambda: self._request("GET", f"/{path}", expect=is_document))

    def watch(self, kind: Kind, *, labels: str) -> Iterator[Object]:
        """Yield each matching object, then each one that changes or is deleted, until the server ends the watch."""
        listed = self._request("GET", self._path(kind), kind, query=selectors(labels), expect=is_list)
        yield from listed["items"] or []
        since = listed.get("metadata", {}).get("resourceVersion", "")
        query = [*selectors(labels), ("watch", "true"), ("resourceVersion", since), ("timeoutSeconds", WATCH_SECONDS)]
        for line in self._stream(self._path(kind), query, WATCH_SECONDS + 15.0):
            change = parsed(line, is_change)
            if change.get("type") in CHANGES:
                yield change["object"]

    def log(
        self, pod: str, container: str, *, tail: int | None, follow: bool = True, previous: bool = False
    ) -> Iterator[str]:
        """Yield the last ``tail`` log lines of a container (None: all), each with its time stamp in front.

        With ``follow``, continue with new lines until the container ends. With ``previous``, read the log of the
        container before its last restart.
        """
        query: Query = [("container", container), ("timestamps", "true")]
        query += [("follow", "true")] if follow else []
        query += [("previous", "true")] if previous else []
        query += [("tailLines", tail)] if tail is not None else []
        yield from self._stream(f"{self._path(PODS, pod)}/log", query, QUIET_LOG_SECONDS if follow else READ_SECONDS)

    def _path(self, kind: Kind, name: str = "") -> str:
        namespace = f"/namespaces/{self.namespace}" if kind.namespaced else ""
        return f"/{kind.api}{namespace}/{kind.plural}" + (f"/{name}" if name else "")

    def _none_if_missing(self, request: Callable[[], Object]) -> Object | None:
        try:
            return request()
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _request(
        self,
        method: str,
        path: str,
        kind: Kind | None = None,
        *,
        query: Query | None = None,
        body: Object | None = None,
        expect: Callable[[Any], bool] | None = None,
    ) -> Object:
        """Send a request and return its JSON response; retry while the server is unavailable.

        A response that is not what the request asks for (``expect``; default: an object) is not the API server's.

        Raises NotAllowed or ApiError for a response that a retry would not change, ServerAway when the time is up.
        """
        until = time.monotonic() + self._patience
        if self._deadline is not None:
            until = min(until, self._deadline)
        while True:
            try:
                left = max(0.5, until - time.monotonic())
                response = self._send(method, path, query, body, (min(CONNECT_SECONDS, left), min(READ_SECONDS, left)))
                answer = parsed(body_of(response), expect or is_object)
                self._allowed_before.add((method, str(kind)))
                self._outage_logged = False
                return answer
            except ApiError as error:
                # A server that has just restarted rejects every request until it has loaded the RBAC rules.
                was_allowed = isinstance(error, NotAllowed) and (method, str(kind)) in self._allowed_before
                if error.status not in UNAVAILABLE and not was_allowed:
                    raise
                problem = error
            except TRANSPORT_ERRORS as error:
                problem = ApiError(0, one_line(redacted(f"{type(error).__name__}: {error}"), MOST_CHARACTERS))
            if time.monotonic() + self._interval >= until:
                if isinstance(problem, NotAllowed):
                    raise problem
                raise ServerAway(problem.status, f"the API server does not answer: {problem.message}")
            if not self._outage_logged:
                self._outage_logged = True  # once per outage
                log.warning("the API server does not answer, retrying: %s", problem.message)
            time.sleep(self._interval)

    def _stream(self, path: str, query: Query, quiet: float) -> Iterator[str]:
        """Yield a streamed response line by line. A lost connection ends the stream without an error."""
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
            error_type = NotAllowed if error.status in {401, 403} else ApiError
            raise error_type(error.status or 0, server_message(error)) from error


def whole_number(quantity: Any) -> int:
    """A count written as a Kubernetes quantity: 16, or 1k."""
    return int(parse_quantity(quantity))


def selectors(labels: str = "", fields: str = "") -> Query:
    return [(key, value) for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value]


def body_of(response: Any) -> bytes:
    """The body of a response. Raises TimeoutError if it takes longer than BODY_SECONDS."""
    if not hasattr(response, "read1"):  # urllib3 1, in the image for XLA: no read returns before all has arrived
        return bytes(response.data)
    until = time.monotonic() + BODY_SECONDS
    pieces = []
    try:
        while piece := response.read1(65536, decode_content=True):  # what has arrived
            pieces.append(piece)
            if time.monotonic() >= until:
                response.close()
                raise TimeoutError(f"the response is not complete after {BODY_SECONDS:g} s")
    finally:
        response.release_conn()
    return b"".join(pieces)


def parsed(text: str | bytes, expect: Callable[[Any], bool]) -> Object:
    """The JSON in a response. Raises ValueError, with a fix, if it is not what is expected."""
    try:
        answer: Object = json.loads(text, object_pairs_hook=without_nulls)
        if expect(answer):
            return answer
        problem = f"not {expect.__doc__}"
    except ValueError as error:
        problem = f"not JSON: {error}"
    except RecursionError:
        problem = "JSON that is nested too deeply"
    raise ValueError(f"the response is {problem}. {CHECK_ADDRESS}")


def without_nulls(pairs: list[tuple[str, Any]]) -> Object:
    """An object of JSON. A null means the same as no key, and a reader need not know both; a list's ``items`` stay."""
    return {key: value for key, value in pairs if value is not None or key == "items"}


def is_document(answer: Any) -> bool:
    """a JSON object"""
    return isinstance(answer, dict)


def is_object(answer: Any) -> bool:
    """an object with metadata"""
    return (
        is_document(answer) and is_document(answer.get("metadata")) and isinstance(answer["metadata"].get("name"), str)
    )


def is_list(answer: Any) -> bool:
    """a list of objects"""
    if not (is_document(answer) and "items" in answer and is_document(answer.get("metadata", {}))):
        return False
    items = answer["items"]
    return items is None or (isinstance(items, list) and all(map(is_object, items)))


def is_change(answer: Any) -> bool:
    """a change of an object"""
    return is_document(answer) and (answer.get("type") not in CHANGES or is_object(answer.get("object")))


def server_message(error: Any) -> str:
    """The ``message`` of the API server's Status object in one line, without headers and JSON."""
    try:
        message = str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError, RecursionError):
        message = f"{error.status} {error.reason}"
    return one_line(redacted(" ".join(message.split())), MOST_CHARACTERS)


def connect(namespace: str | None, *, context: str | None = None, **options: Any) -> Api:
    """Connect to the cluster that Helm would use: $KUBECONFIG, else ~/.kube/config, else the cluster of this pod.

    The default namespace is that of the context. ``options`` are those of Api. Raises UserError without a usable
    kubeconfig.
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
            chosen = context_of(context, path)
            refuse_server(settings.host, str(chosen["cluster"]))
            namespace = namespace or chosen.get("namespace") or "default"
    except INVALID_KUBECONFIG as error:
        look = "get-contexts" if context else "current-context"
        fix = f"Set KUBECONFIG, or check: kubectl config {look}"
        reason = redacted(" ".join(str(error).split()))
        if isinstance(error, (AttributeError, LookupError, TypeError)):
            reason = f"{one_line(path, MOST_CHARACTERS)} does not have the form of one"
        raise UserError(f"no usable kubeconfig: {reason}", fix=fix) from error
    settings.retries = False  # Api retries itself, more slowly, and logs it
    api_client = client.ApiClient(settings)
    if settings.verify_ssl:
        accept_older_certificates(api_client)
    without_discovery = dynamic.DynamicClient(api_client, discoverer=lambda client, cache: None)
    return Api(without_discovery, namespace, **options)


def accept_older_certificates(api_client: Any) -> None:
    """Verify certificates as before Python 3.13, as Helm and kubectl do.

    Python 3.13 sets VERIFY_X509_STRICT, which refuses API servers whose certificates lack extensions of RFC 5280, such
    as EKS's without an authority key identifier (kubernetes-client/python issue 2394).
    """
    context = create_urllib3_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    api_client.rest_client.pool_manager.connection_pool_kw["ssl_context"] = context


def context_of(context: str | None, path: str) -> dict[str, Any]:
    """The context of this name, or the current one: its cluster, user and namespace."""
    contexts, chosen = config.list_kube_config_contexts(path)
    if context:
        chosen = next(one for one in contexts if one["name"] == context)
    found: dict[str, Any] = chosen["context"]
    return found


def refuse_server(address: str | None, cluster: str) -> None:
    """Raise UserError if this is not the address of a server. (The client fails only when it connects.)"""
    if not is_web_address(address or ""):
        what = f"cluster {one_line(cluster)} of the kubeconfig has no valid server"
        fix = "Write its server as https://HOST:PORT, or choose another context with --kube-context."
        raise UserError(what, fix=fix)
