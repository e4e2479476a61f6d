"""One archive for a bug report: values, objects, events, logs and the stages' manifests of a release, redacted.

Names in it are always the same, so that it can be read by a program; ``genvalues local`` runs its values again.
What could not be read is said in it (not-read.txt), never fatal: half a report is better than none.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

from genvalues import __version__
from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, ApiError
from genvalues.cluster.api import Kind as ApiKind
from genvalues.cluster.objects import INSTANCE, container_statuses, last_seen, name_of
from genvalues.common.dicts import get
from genvalues.common.errors import Unavailable, UserError, write_errors_as_user_errors
from genvalues.common.files import place_of, write_named
from genvalues.common.helm import client, user_values
from genvalues.common.manifests import manifests_in
from genvalues.common.text import one_line
from genvalues.inputs.yaml_text import dump
from genvalues.ops.records import Object, Record, find_record
from genvalues.ops.redact import redact_object, redact_text, redact_yaml
from genvalues.ops.status import Watcher, as_json, cluster_config

ROOT = "bundle"
ABOUT, VALUES = f"{ROOT}/about.json", f"{ROOT}/values.yaml"  # first in the archive: a replay reads no further
FORMAT = 1  # of the archive: another number where a reader of this one would misread it
CONFIG_MAPS = ApiKind("api/v1", "configmaps")
DEPLOYMENTS = ApiKind("apis/apps/v1", "deployments")
OPERATOR = "training-operator"  # the Deployment of Kubeflow's training operator v1, in namespace kubeflow
LOG_BYTES = 4 << 20  # of each container: the end
LOG_LINES = 50_000
MOMENT = 0  # every file's time in the archive: the same state, the same bytes
READ_AT_MOST = 16 << 20  # of an archive that somebody sent
OPENED_AT_MOST = 8


class Bundle:
    """Files by their names in the archive, redacted as they come."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.not_read: list[str] = []
        self.manifests: dict[str, dict[str, Any]] = {}  # by stage, as the logs tell it

    def text(self, name: str, text: str) -> None:
        self.files[f"{ROOT}/{name}"] = redact_text(text).encode(errors="replace")

    def yaml(self, name: str, value: Any) -> None:
        self.text(name, dump(redact_object(value)))

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(redact_object(value), indent=2, ensure_ascii=False, sort_keys=True) + "\n")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """What cannot be read is noted, and the rest goes on."""
        try:
            yield
        except (ApiError, UserError, Unavailable, *kinds.TRANSPORT_ERRORS) as problem:
            self.not_read.append(redact_text(f"{what}: {' '.join(str(problem).split())}"))

    def packed(self) -> bytes:
        """As a .tar.gz: about.json and values.yaml first, then by name; without times and users of this computer."""
        self.text("not-read.txt", "".join(f"{line}\n" for line in self.not_read))
        first = [name for name in (ABOUT, VALUES) if name in self.files]
        names = [*first, *sorted(set(self.files) - set(first))]
        archive = io.BytesIO()
        with (
            gzip.GzipFile(fileobj=archive, mode="wb", mtime=MOMENT) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = len(self.files[name]), MOMENT, 0o600
                tar.addfile(info, io.BytesIO(self.files[name]))
        return archive.getvalue()


def bundle(watcher: Watcher, output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the archive; what --json prints. Raises UserError for no such release or a place that cannot be written."""
    with write_errors_as_user_errors(f"-o {output}"):
        place_of(output)  # before anything is asked: collecting may take minutes
    record = watcher.need_record()
    made = collected(watcher, record)
    content = made.packed()
    with write_errors_as_user_errors(f"-o {output}"):
        write_named(output, content, mode=0o600)
    for line in made.not_read:
        say(f"not read: {line}")
    say(
        f"Wrote {output} ({len(content) / 1e6:.1f} MB, {len(made.files)} files), without tokens and account numbers. "
        "It names your model, dataset and buckets, and its logs may quote rows: look before you send it."
    )
    return {"file": str(output), "bytes": len(content), "files": sorted(made.files), "notRead": made.not_read}


def collected(watcher: Watcher, record: Record) -> Bundle:
    made, server = Bundle(), watcher.server
    with made.reading("values"):
        made.yaml("values.yaml", user_values(record.release, record.namespace, watcher.context))
    with made.reading("values with the chart's defaults"):
        made.yaml("values-all.yaml", user_values(record.release, record.namespace, watcher.context, computed=True))
    add_record(made, record, "release")
    if record.runner:
        with made.reading(f"release {record.release}-run"):
            if inner := find_record(f"{record.release}-run", record.namespace, watcher.context):
                add_record(made, inner, "release-run")
    with made.reading("status"):
        made.json("status.json", as_json(watcher.look()))
    labels = f"{INSTANCE} in ({record.release},{record.release}-run)"
    for kind in (kinds.JOBS, kinds.PYTORCH_JOBS, CONFIG_MAPS):
        with made.reading(str(kind)):
            made.yaml(f"objects/{kind.plural}.yaml", sorted(server.list(kind, labels=labels), key=name_of))
    pods: list[Object] = []
    with made.reading("pods"):
        pods = sorted(server.list(kinds.PODS, labels=labels), key=name_of)
        made.yaml("objects/pods.yaml", pods)
    claim = get(cluster_config(record), "claim.name", str) or f"{record.release}-workspace"
    with made.reading(str(kinds.CLAIMS)):
        found = server.get(kinds.CLAIMS, claim)
        made.yaml("objects/persistentvolumeclaims.yaml", [found] if found else [])
    with made.reading(str(kinds.EVENTS)):  # of ours: others' are in the namespace, too
        events = [one for one in server.list(kinds.EVENTS) if is_about(one, record, claim)]
        made.yaml("objects/events.yaml", sorted(events, key=lambda one: (last_seen(one), name_of(one))))
    with made.reading("nodes"):
        made.yaml("objects/nodes.yaml", [node_summary(node) for node in sorted(server.list(kinds.NODES), key=name_of)])
    for pod in pods:
        add_logs(made, server, pod)
    for stage, manifest in made.manifests.items():
        made.json(f"stages/{stage}.json", manifest)
    made.json("about.json", about(made, watcher, record))
    return made


def is_about(event: Object, record: Record, claim: str) -> bool:
    """Whether an event's object is the release's, by its name: that of an object that is gone says no more."""
    fullname = get(cluster_config(record), "fullname", str) or record.release
    about = str((event.get("involvedObject") or {}).get("name", ""))
    return about == claim or about.startswith((f"{record.release}-", f"{fullname}-")) or about == record.release


def add_record(made: Bundle, record: Record, folder: str) -> None:
    made.yaml(f"{folder}/manifest.yaml", [item for item in record.resources if item["kind"] != "Secret"])
    made.yaml(f"{folder}/hooks.yaml", [{"phase": hook.phase, "manifest": hook.manifest} for hook in record.hooks])
    for file in ("run.yaml", "cluster.yaml", "values.yaml"):
        if text := record.config(file):
            made.text(f"{folder}/config/{file}", redact_yaml(text))


def about(made: Bundle, watcher: Watcher, record: Record) -> dict[str, Any]:
    """Versions, and which release it was. Last, because all of these are asked for."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "genvalues": __version__,
        "release": record.release,
        "namespace": record.namespace,
        "revision": record.revision,
        "helmStatus": record.status,
        "mode": record.mode,
        "chart": (cluster_config(record).get("chart") or {}).get("version"),
    }
    with made.reading("Helm's version"):
        found["helm"] = str(client(watcher.context).version)
    with made.reading("Kubernetes' version"):
        found["kubernetes"] = (watcher.server.discover("version") or {}).get("gitVersion")
    with made.reading("the training operator's image"):
        found["trainingOperator"] = operator_image(watcher.context)
    return found


def operator_image(context: str | None) -> str | None:
    """In the namespace where Kubeflow's manifests put it; None where it is not to be seen there."""
    server = kinds.connect("kubeflow", context=context, patience=5.0)
    deployments = [item for item in server.list(DEPLOYMENTS) if OPERATOR in name_of(item)]
    images = [one["image"] for item in deployments for one in item["spec"]["template"]["spec"]["containers"]]
    return images[0] if images else None


def node_summary(node: Object) -> dict[str, Any]:
    """What matters of a node: its type, what it has, what keeps pods away; not its addresses."""
    labels = node["metadata"].get("labels") or {}
    status = node.get("status", {})
    wanted = ("node.kubernetes.io/", "topology.kubernetes.io/", "sagemaker.amazonaws.com/", "karpenter.sh/")
    return {
        "name": name_of(node),
        "labels": {key: value for key, value in labels.items() if key.startswith(wanted)},
        "taints": node.get("spec", {}).get("taints") or [],
        "unschedulable": bool(node.get("spec", {}).get("unschedulable")),
        "allocatable": status.get("allocatable"),
        "conditions": {one["type"]: one["status"] for one in status.get("conditions") or []},
        "kubelet": (status.get("nodeInfo") or {}).get("kubeletVersion"),
    }


def add_logs(made: Bundle, server: Api, pod: Object) -> None:
    """Every container's, and what it wrote before its last restart."""
    for container in container_statuses(pod):
        state, before = container.get("state") or {}, container.get("lastState") or {}
        if not ({"running", "terminated"} & set(state) or before):
            continue  # nothing in it yet
        name = f"logs/{name_of(pod)}/{container['name']}"
        with made.reading(f"log of {name_of(pod)}"):
            log = log_end(server, name_of(pod), container["name"], previous=False)
            made.text(f"{name}.log", log)
            for stage, manifest in manifests_in(log).items():
                made.manifests[stage] = newer(made.manifests.get(stage), manifest)
        if container.get("restartCount") or before:
            with made.reading(f"log of {name_of(pod)} before its restart"):
                made.text(f"{name}.previous.log", log_end(server, name_of(pod), container["name"], previous=True))


def newer(known: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """A stage's pods tell of its manifest, and so does its gate; an earlier revision's may be there, too."""
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


# --- read again


def is_bundle(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz"))


def read_bundle(path: Path) -> tuple[dict[str, Any], str]:
    """What an archive says of itself, and the text of its values. Nothing is unpacked to the disk: of the first files
    in it these two are read, and no more than READ_AT_MOST bytes of what it unpacks to."""
    where, fix = str(path), "Give an archive that `genvalues bundle` has written."
    found: dict[str, str] = {}
    try:
        with (
            path.open("rb") as file,
            gzip.GzipFile(fileobj=file) as unpacked,
            tarfile.open(fileobj=cast(Any, Limited(unpacked, READ_AT_MOST)), mode="r|") as tar,
        ):
            for count, member in enumerate(tar):
                if count >= OPENED_AT_MOST or len(found) == 2:
                    break
                name = str(PurePosixPath(member.name))
                if name in (ABOUT, VALUES) and member.isreg() and (content := tar.extractfile(member)):
                    found[name] = content.read().decode("utf-8")
        about = json.loads(found.get(ABOUT, "null"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be read: {reason}", where=where, fix=fix) from None
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"is no bundle: {' '.join(str(error).split())}", where=where, fix=fix) from None
    if VALUES not in found or not isinstance(about, dict):
        raise UserError(f"is no bundle: it does not begin with {ABOUT} and {VALUES}", where=where, fix=fix)
    if type(about.get("format")) is not int or about["format"] != FORMAT:
        said = one_line(json.dumps(about["format"])) if "format" in about else "none"
        by = one_line(str(about.get("genvalues") or "another"))
        what = f"is a bundle of format {said}; genvalues {__version__} reads format {FORMAT}"
        raise UserError(what, where=where, fix=f"Use the genvalues that wrote it: {by}.")
    return about, found[VALUES]


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Limited:
    """A file of which only so much can be read: an archive may unpack to more than any disk holds."""

    def __init__(self, file: Readable, at_most: int) -> None:
        self._file = file
        self._left = at_most

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._left:
            size = self._left + 1
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it unpacks to more than a bundle's first files may have")
        return data
