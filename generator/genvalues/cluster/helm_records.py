"""Helm's records of a release: one object for each revision, in Secrets or, with HELM_DRIVER=configmap, in ConfigMaps.

Those of RELEASE-run are in ConfigMaps: Helm lists them, RBAC cannot limit ``list`` to Helm's Secrets, and so a runner
whose records are Secrets may read every Secret of the namespace. Earlier versions of the chart kept them in Secrets.
The runner moves these, and cleanup deletes those that no runner has moved; for this their roles name the first MOVABLE.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import logging
import zlib
from collections.abc import Iterator

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.kinds import Kind, Object
from genvalues.cluster.objects import COMPONENT, INSTANCE, labels_of, name_of
from genvalues.common.errors import UserError

log = logging.getLogger(__name__)

OF_INNER_RELEASE = kinds.CONFIG_MAPS
INNER_ENVIRONMENT = {"HELM_DRIVER": "configmap"}  # of every Helm that works on RELEASE-run
MOVABLE = 50  # revisions in resourceNames: llama-lora.run.secretNames in chart/templates/runner/rbac.yaml
UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, OSError, EOFError, zlib.error, binascii.Error)


def names_in_secrets(release: str) -> Iterator[str]:
    return (f"sh.helm.release.v1.{release}.v{revision}" for revision in range(1, MOVABLE + 1))


def move_to_config_maps(api: Api, release: str) -> None:
    """Move the records of ``release`` from Secrets to ConfigMaps. A move that was interrupted is completed.

    Raises UserError if the release exists without a record: Helm would install it as revision 1, whose jobs may exist.
    """
    for name in names_in_secrets(release):
        if record := api.get(kinds.SECRETS, name):
            log.info("%s: moving Helm's record from a Secret to a ConfigMap", name)
            api.create(kinds.CONFIG_MAPS, as_config_map(api, record))
            api.delete(kinds.SECRETS, name)
    config = api.list(kinds.CONFIG_MAPS, labels=f"{INSTANCE}={release},{COMPONENT}=config")
    if config and not api.list(kinds.CONFIG_MAPS, labels=f"owner=helm,name={release}"):
        uninstall = f"helm -n {api.namespace} uninstall {release} --no-hooks --ignore-not-found"
        delete = f"kubectl -n {api.namespace} delete configmap {name_of(config[0])} --ignore-not-found"
        raise UserError(
            f"Helm's records of release {release} not found in ConfigMaps, nor in Secrets up to revision {MOVABLE}",
            fix=f"Run: {uninstall}; {delete}. Then run helm upgrade",
        )


def as_config_map(api: Api, secret: Object) -> Object:
    try:
        content = base64.b64decode(secret["data"]["release"]).decode("ascii")
    except UNREADABLE as error:
        raise unreadable(api, kinds.SECRETS, secret) from error
    metadata = {"name": name_of(secret), "namespace": api.namespace, "labels": labels_of(secret)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"release": content}}


def delete_from_secrets(api: Api, release: str) -> None:
    for name in names_in_secrets(release):
        api.delete(kinds.SECRETS, name)


def marked_failed(api: Api, kind: Kind, record: Object) -> Object:
    """The record with status failed, as Helm sets it when it is stopped by a signal. Raises UserError."""
    try:
        content = with_status_failed(record["data"]["release"], in_secret=kind == kinds.SECRETS)
    except UNREADABLE as error:
        raise unreadable(api, kind, record) from error
    return {
        **record,
        "apiVersion": "v1",
        "kind": "Secret" if kind == kinds.SECRETS else "ConfigMap",
        "metadata": {**record["metadata"], "labels": {**labels_of(record), "status": "failed"}},
        "data": {**record["data"], "release": content},
    }


def with_status_failed(content: str, *, in_secret: bool) -> str:
    """The content of a record with status failed.

    Its encoding: JSON, compressed by gzip, in base64 by Helm, and again in base64 by a Secret.
    """
    packed = base64.b64decode(content)
    release = json.loads(gzip.decompress(base64.b64decode(packed) if in_secret else packed))
    release["info"].update(status="failed", description="the Helm client was killed")
    packed = base64.b64encode(gzip.compress(json.dumps(release, ensure_ascii=False).encode(), mtime=0))
    return (base64.b64encode(packed) if in_secret else packed).decode()


def unreadable(api: Api, kind: Kind, record: Object) -> UserError:
    what = f"{'secret' if kind == kinds.SECRETS else 'configmap'} {name_of(record)}"
    fix = f"Delete it: kubectl -n {api.namespace} delete {what}"
    return UserError("not a valid Helm release record", where=what, fix=fix)
