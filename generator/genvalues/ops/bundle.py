"""One archive for a bug report: values, objects, events, logs and the stages' manifests of a release, redacted.

File names in it never change, so that programs can read it; ``genvalues local`` runs its values again. What could not
be read is listed in not-read.txt and is never an error: half a report is better than none.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from genvalues import __version__
from genvalues.cluster import kinds
from genvalues.cluster.api import TRANSPORT_ERRORS, Api, connect
from genvalues.cluster.kinds import ApiError
from genvalues.cluster.kinds import Kind as ApiKind
from genvalues.cluster.objects import container_statuses, inner_release_of, last_seen, name_of
from genvalues.cluster.workloads import WORKLOADS
from genvalues.common.dicts import get
from genvalues.common.errors import Unavailable, UserError, write_errors_as_user_errors
from genvalues.common.files import place_of, refuse_fifo, write_named
from genvalues.common.helm import client, user_values
from genvalues.common.json_files import InvalidJson, parse_json
from genvalues.common.manifests import manifests_in
from genvalues.common.text import one_line
from genvalues.inputs.yaml_text import MAX_BYTES, dump
from genvalues.ops.records import HelmRecord, Object, find_record
from genvalues.ops.redact import redact_object, redact_text, selected
from genvalues.ops.status import ReleaseWatcher

log = logging.getLogger(__name__)

REVIEW = (
    "It contains the names of your model, dataset and buckets, and its logs may quote rows of the dataset: review it "
    "before you send it."
)
ROOT = "bundle"
ABOUT, VALUES = f"{ROOT}/about.json", f"{ROOT}/values.yaml"  # first in the archive, so that a replay reads no further
FORMAT = 1  # of the archive; increase it when this version's readers would misread the new one
DEPLOYMENTS = ApiKind("apis/apps/v1", "deployments")
OPERATOR = "training-operator"  # the Deployment of Kubeflow's training operator v1, in namespace kubeflow
NODE_LABELS = ("node.kubernetes.io/", "topology.kubernetes.io/", "sagemaker.amazonaws.com/", "karpenter.sh/")
LOG_BYTES = 4 << 20  # kept of each container's log: the end
LOG_LINES = 50_000
MODIFIED = 0  # the time of every file in the archive: the same state gives the same bytes
READ_AT_MOST = 16 << 20  # unpacked bytes: a small archive may unpack to more than fits in memory
OPENED_AT_MOST = 8  # files read from an archive


def bundle(watcher: ReleaseWatcher, output: Path) -> dict[str, Any]:
    """Write the archive and return what --json prints.

    Raises UserError if the release does not exist or the archive cannot be written.
    """
    with write_errors_as_user_errors(f"-o {output}"):
        place_of(output)  # first, because collecting may take minutes
    archive = collect(watcher, watcher.record())
    content = archive.packed()
    with write_errors_as_user_errors(f"-o {output}"):
        write_named(output, content, mode=0o600)
    for line in archive.not_read:
        log.warning("not read: %s", line)
    size = f"{len(content) / 1e6:.1f} MB, {len(archive.files)} files"
    log.info("Wrote %s (%s), without tokens, passwords and account numbers. %s", output, size, REVIEW)
    return {"file": str(output), "bytes": len(content), "files": sorted(archive.files), "notRead": archive.not_read}


class Archive:
    """Files by name, redacted as they are added."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.not_read: list[str] = []

    def text(self, name: str, text: str) -> None:
        self.files[f"{ROOT}/{name}"] = redact_text(text).encode(errors="replace")

    def yaml(self, name: str, value: Any) -> None:
        self.text(name, dump(redact_object(value)))

    def objects(self, name: str, items: Sequence[Object], kind: str = "") -> None:
        """Add the parts of Kubernetes objects that ``selected`` keeps."""
        self.yaml(name, [kept for item in items if (kept := selected(item, kind))])

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(redact_object(value), indent=2, ensure_ascii=False, sort_keys=True) + "\n")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Record what cannot be read, and go on."""
        try:
            yield
        except (ApiError, UserError, Unavailable, *TRANSPORT_ERRORS) as problem:
            self.not_read.append(redact_text(f"{what}: {' '.join(str(problem).split())}"))

    def packed(self) -> bytes:
        """The files as a .tar.gz, about.json and values.yaml first, without times and users of this computer."""
        self.text("not-read.txt", "".join(f"{line}\n" for line in self.not_read))
        packed = io.BytesIO()
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", mtime=MODIFIED) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in sorted(self.files, key=lambda name: (name not in (ABOUT, VALUES), name)):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = len(self.files[name]), MODIFIED, 0o600
                tar.addfile(info, io.BytesIO(self.files[name]))
        return packed.getvalue()


def collect(watcher: ReleaseWatcher, record: HelmRecord) -> Archive:
    archive = Archive()
    add_values(archive, watcher)
    add_record(archive, record, "release")
    if record.runner:
        inner_name = inner_release_of(record.release)
        with archive.reading(f"release {inner_name}"):
            if inner := find_record(inner_name, record.namespace, watcher.context):
                add_record(archive, inner, "release-run")
    with archive.reading("status"):
        archive.json("status.json", watcher.status().document())
    pods = add_objects(archive, watcher, record)
    add_logs(archive, watcher.server, pods)
    archive.json("about.json", about(archive, watcher, record))
    return archive


def add_values(archive: Archive, watcher: ReleaseWatcher) -> None:
    release, namespace, context = watcher.release, watcher.server.namespace, watcher.context
    with archive.reading("values"):
        archive.yaml("values.yaml", user_values(release, namespace, context))
    with archive.reading("values with the chart's defaults"):
        archive.yaml("values-all.yaml", user_values(release, namespace, context, computed=True))


def add_record(archive: Archive, record: HelmRecord, folder: str) -> None:
    archive.objects(f"{folder}/manifest.yaml", record.resources)
    hooks = [{"phase": hook.phase, "manifest": selected(hook.manifest)} for hook in record.hooks]
    archive.yaml(f"{folder}/hooks.yaml", [hook for hook in hooks if hook["manifest"]])
    for file in ("run.yaml", "cluster.yaml", "values.yaml"):
        if config := record.config(file):
            archive.yaml(f"{folder}/config/{file}", config)


def add_objects(archive: Archive, watcher: ReleaseWatcher, record: HelmRecord) -> list[Object]:
    """Add the objects of the release and the nodes; return the pods."""
    server = watcher.server

    def listed(kind: ApiKind) -> list[Object]:
        return sorted(server.list(kind, labels=watcher.selector), key=name_of)

    def events() -> list[Object]:
        ours = [one for one in server.list(kinds.EVENTS) if is_about(one, record)]
        return sorted(ours, key=lambda one: (last_seen(one), name_of(one)))

    def claim() -> list[Object]:
        return [found] if (found := server.get(kinds.CLAIMS, record.claim)) else []

    sources: dict[str, tuple[str, Callable[[], list[Object]]]] = {
        "jobs": ("Job", partial(listed, kinds.JOBS)),
        **{workload.kind.plural: (workload.name, partial(listed, workload.kind)) for workload in WORKLOADS},
        "configmaps": ("ConfigMap", partial(listed, kinds.CONFIG_MAPS)),
        "pods": ("Pod", partial(listed, kinds.PODS)),
        "persistentvolumeclaims": ("PersistentVolumeClaim", claim),
        "events": ("Event", events),
    }
    read: dict[str, list[Object]] = {}
    for name, (kind, source) in sources.items():
        with archive.reading(name):
            read[name] = source()
            archive.objects(f"objects/{name}.yaml", read[name], kind)
    with archive.reading("nodes"):
        nodes = sorted(server.list(kinds.NODES), key=name_of)
        archive.yaml("objects/nodes.yaml", [node_summary(node) for node in nodes])
    return read.get("pods", [])


def is_about(event: Object, record: HelmRecord) -> bool:
    """Whether the event's object belongs to the release, by its name: the object itself may not exist any more."""
    fullname = get(record.cluster_config, "fullname", str) or record.release
    about = str((event.get("involvedObject") or {}).get("name", ""))
    return about in (record.claim, record.release) or about.startswith((f"{record.release}-", f"{fullname}-"))


def node_summary(node: Object) -> dict[str, Any]:
    """A node's type, what it offers and what keeps pods away; not its addresses."""
    labels = node["metadata"].get("labels") or {}
    status = node.get("status", {})
    return {
        "name": name_of(node),
        "labels": {key: value for key, value in labels.items() if key.startswith(NODE_LABELS)},
        "taints": node.get("spec", {}).get("taints") or [],
        "unschedulable": bool(node.get("spec", {}).get("unschedulable")),
        "allocatable": status.get("allocatable"),
        "conditions": {one["type"]: one["status"] for one in status.get("conditions") or []},
        "kubelet": (status.get("nodeInfo") or {}).get("kubeletVersion"),
    }


def add_logs(archive: Archive, server: Api, pods: Sequence[Object]) -> None:
    """Add every container's log, that of before its last restart, and the manifests in them by stage."""
    manifests: dict[str, dict[str, Any]] = {}
    for pod in pods:
        for container in container_statuses(pod):
            state, before = container.get("state") or {}, container.get("lastState") or {}
            if not ({"running", "terminated"} & set(state) or before):
                continue  # no log yet
            name = f"logs/{name_of(pod)}/{container['name']}"
            with archive.reading(f"log of {name_of(pod)}"):
                text = log_end(server, name_of(pod), container["name"], previous=False)
                archive.text(f"{name}.log", text)
                for stage, manifest in manifests_in(text).items():
                    manifests[stage] = newer(manifests.get(stage), manifest)
            if container.get("restartCount") or before:
                with archive.reading(f"log of {name_of(pod)} before its restart"):
                    text = log_end(server, name_of(pod), container["name"], previous=True)
                    archive.text(f"{name}.previous.log", text)
    for stage, manifest in manifests.items():
        archive.json(f"stages/{stage}.json", manifest)


def newer(known: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """The manifest that was finished last: pods and gate both log it, and an earlier revision's may be there, too."""
    return found if known is None or str(found.get("finished")) >= str(known.get("finished")) else known


def log_end(server: Api, pod: str, container: str, *, previous: bool) -> str:
    """The last LOG_BYTES of a log, in whole lines."""
    lines: deque[str] = deque()
    size = 0
    for line in server.log(pod, container, tail=LOG_LINES, follow=False, previous=previous):
        lines.append(line + "\n")
        size += len(lines[-1])
        while size > LOG_BYTES:
            size -= len(lines.popleft())
    return "".join(lines)


def about(archive: Archive, watcher: ReleaseWatcher, record: HelmRecord) -> dict[str, Any]:
    """Versions, and which release it is."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "genvalues": __version__,
        "release": record.release,
        "namespace": record.namespace,
        "revision": record.revision,
        "helmStatus": record.status,
        "mode": record.mode,
        "chart": get(record.cluster_config, "chart.version", str),
    }
    with archive.reading("Helm's version"):
        found["helm"] = str(client(watcher.context).version)
    with archive.reading("Kubernetes' version"):
        found["kubernetes"] = (watcher.server.discover("version") or {}).get("gitVersion")
    with archive.reading("the training operator's image"):
        found["trainingOperator"] = operator_image(watcher.context)
    return found


def operator_image(context: str | None) -> str | None:
    """The image of the operator in the namespace that Kubeflow's manifests use; None if it is not there."""
    server = connect("kubeflow", context=context, patience=5.0)
    deployments = [item for item in server.list(DEPLOYMENTS) if OPERATOR in name_of(item)]
    images = [one["image"] for item in deployments for one in item["spec"]["template"]["spec"]["containers"]]
    return images[0] if images else None


# --- read again


def read_bundle(path: Path) -> tuple[dict[str, Any], str]:
    """Return what an archive says about itself, and the text of its values.

    Reads at most the first READ_AT_MOST bytes and OPENED_AT_MOST files, and writes nothing to the disk. Raises
    UserError for a file that cannot be read, is not a bundle, or has another format.
    """
    where, fix = str(path), "Use an archive that `genvalues bundle` has written."
    found: dict[str, str] = {}
    try:
        refuse_fifo(path)
        with gzip.open(path) as packed, tarfile.open(fileobj=io.BytesIO(packed.read(READ_AT_MOST)), mode="r:") as tar:
            for member in itertools.islice(tar, OPENED_AT_MOST):
                name = str(PurePosixPath(member.name))
                if name == VALUES and member.size > MAX_BYTES:
                    raise UserError(
                        f"is not a bundle: {VALUES} is larger than {MAX_BYTES >> 10} KiB", where=where, fix=fix
                    )
                if name in (ABOUT, VALUES) and member.isreg() and (content := tar.extractfile(member)):
                    found[name] = content.read().decode("utf-8")
                if len(found) == 2:
                    break
        about = parse_json(found.get(ABOUT, "null"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be read: {reason}", where=where, fix=fix) from None
    except InvalidJson as error:
        raise UserError(f"is not a bundle: {ABOUT} {error}", where=where, fix=fix) from None
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"is not a bundle: {' '.join(str(error).split())}", where=where, fix=fix) from None
    if VALUES not in found or not isinstance(about, dict):
        raise UserError(f"is not a bundle: it does not begin with {ABOUT} and {VALUES}", where=where, fix=fix)
    if type(about.get("format")) is not int or about["format"] != FORMAT:
        theirs = one_line(str(about["format"])) if isinstance(about.get("format"), (str, int, float)) else "none"
        by = one_line(str(about.get("genvalues") or "unknown"))
        what = f"is a bundle of format {theirs}; genvalues {__version__} reads format {FORMAT}"
        raise UserError(what, where=where, fix=f"Use the version of genvalues that wrote it: {by}.")
    return about, found[VALUES]
