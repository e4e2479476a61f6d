"""Taking a release down: what will be stopped is said before, what stays and what it costs after."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, ApiError
from genvalues.cluster.api import Kind as ApiKind
from genvalues.common.dicts import get
from genvalues.common.errors import UserError
from genvalues.common.helm import STDERR, run_helm, user_values
from genvalues.ops.records import Record
from genvalues.ops.status import ReleaseStatus, Watcher, camel_case, cluster_config, told_in_a_line

VOLUMES = ApiKind("api/v1", "persistentvolumes", namespaced=False)
# The cleanup hook's own time on top of cleanup.timeoutSeconds: 130 s until its pod has started, and 20 s (the chart's
# cleanup/_job.tpl); the rest is for what Helm itself removes.
BEYOND_CLEANUP = 270
CLEANUP_SECONDS = 180  # the chart's default


@dataclass(frozen=True)
class RemainingResources:
    """Something that uninstall leaves, and the command that removes it."""

    what: str
    command: str
    costs: bool = False  # money, until it is removed


def uninstall(
    watcher: Watcher, say: Callable[[str], None], confirm: Callable[[str], bool]
) -> tuple[int, dict[str, Any]]:
    """Uninstall the release; exit status and what --json prints. ``confirm`` is asked once, before anything is done."""
    release, namespace, context = watcher.release, watcher.server.namespace, watcher.context
    record = watcher.need_record()
    refuse_inner(record, context)
    status = watcher.look()
    with told_in_a_line(namespace):
        staying = what_stays(watcher.server, record)
    values = user_values(release, namespace, context, computed=True)
    for line in what_stops(status):
        say(line)
    if not confirm(f"Uninstall {release} in {namespace}?"):
        say("Nothing was done.")
        return 1, {"release": release, "uninstalled": False, "stays": []}
    seconds = int(get(values, "cleanup.timeoutSeconds", int) or CLEANUP_SECONDS) + BEYOND_CLEANUP
    arguments = ["uninstall", release, "--namespace", namespace, *(["--kube-context", context] if context else [])]
    arguments += ["--timeout", f"{seconds}s"]
    say(f"Running: helm {shlex.join(arguments)}")
    failed = run_helm(arguments, output=STDERR)
    document = {"release": release, "namespace": namespace, "uninstalled": not failed}
    if failed:
        say(
            f"{release} is still there. What still runs: genvalues status {release} --namespace {namespace}; where its "
            "image cannot be pulled: docs/operations.md, uninstall by hand."
        )
        return 1, {**document, "stays": []}
    for line in told(staying):
        say(line)
    return 0, {**document, "stays": camel_case([asdict(one) for one in staying])}


def refuse_inner(record: Record, context: str | None) -> None:
    """RELEASE-run of a detached release is its runner's, who would install it again."""
    outer = record.release.removesuffix("-run")
    if outer == record.release:
        return
    from genvalues.ops.records import find_record

    owner = find_record(outer, record.namespace, context)
    if owner is not None and owner.runner:
        raise UserError(
            f"is installed by the runner of {outer} and goes with it",
            where=record.release,
            fix=f"Write: genvalues uninstall {outer} --namespace {record.namespace}",
        )


def what_stops(status: ReleaseStatus) -> list[str]:
    """Before: what runs, and what is lost with it."""
    running = [stage for stage in (status.runner, *status.stages) if stage and stage.state == "running"]
    if not running:
        return [f"Nothing of {status.release} runs."]
    lines = []
    for stage in running:
        step = (stage.progress or {}).get("step")
        at = f" at step {step} of {(stage.progress or {}).get('totalSteps')}" if step is not None else ""
        pods = f" ({', '.join(stage.pods)})" if stage.pods else ""
        lines.append(f"Will be stopped: {stage.name}{at}{pods}")
    if any(stage.name == "train" for stage in running):
        lines.append("Training saves a checkpoint when it is stopped, and goes on there when it is installed again.")
    return lines


def told(staying: list[RemainingResources]) -> list[str]:
    lines = ["What stays:"]
    for one in staying:
        lines.append(f"  {one.what}{' - costs money until it is removed' if one.costs else ''}")
        if one.command:
            lines.append(f"    remove it: {one.command}")
    return lines


def what_stays(server: Api, record: Record) -> list[RemainingResources]:
    """The volume with everything on it, what the release made for it, and the Secret; read before it is uninstalled."""
    config, namespace = cluster_config(record), record.namespace
    kubectl = f"kubectl -n {namespace} delete"
    found: list[RemainingResources] = []
    name = get(config, "claim.name", str) or f"{record.release}-workspace"
    managed = get(config, "claim.managed", bool)
    claim = optional(lambda: server.get(kinds.CLAIMS, name))
    if claim is not None:
        asked = get(claim, "spec.resources.requests.storage", str) or "?"
        size = get(claim, "status.capacity.storage", str) or asked
        storage_class = get(claim, "spec.storageClassName", str)
        of_class = f", storage class {storage_class}" if storage_class else ""
        yours = "" if managed else ", which is yours (storage.existingClaim)"
        found.append(
            RemainingResources(
                f"claim {name}, {size}{of_class}{yours}: models, datasets and results of every run",
                f"{kubectl} pvc {name}",
                costs=True,
            )
        )
        found += volume_of(server, claim)
    elif managed:
        found.append(
            RemainingResources(
                f"claim {name}, if there is one (it could not be read)", f"{kubectl} pvc {name}", costs=True
            )
        )
    for item in record.resources:
        if item["kind"] == "StorageClass":
            made = item["metadata"]["name"]
            found.append(RemainingResources(f"storage class {made}", f"kubectl delete storageclass {made}"))
    if secret := get(config, "secret.name", str):
        found.append(
            RemainingResources(f"secret {secret}, the Hugging Face token, which is yours", f"{kubectl} secret {secret}")
        )
    return found


def volume_of(server: Api, claim: dict[str, Any]) -> list[RemainingResources]:
    """The claim's volume where it outlives the claim, and the file system behind it."""
    volume_name = get(claim, "spec.volumeName", str)
    volume = optional(lambda: server.get(VOLUMES, volume_name)) if volume_name else None
    if volume is None:
        what = f"volume {volume_name}, which could not be read: perhaps it outlives its claim"
        return [RemainingResources(what, f"kubectl delete pv {volume_name}", costs=True)] if volume_name else []
    if get(volume, "spec.persistentVolumeReclaimPolicy", str) != "Retain":
        return []  # goes with its claim
    found = [RemainingResources(f"volume {volume_name}, which outlives its claim", f"kubectl delete pv {volume_name}")]
    handle = get(volume, "spec.csi.volumeHandle", str)
    if get(volume, "spec.csi.driver", str) == "fsx.csi.aws.com" and handle:
        command = f"aws fsx delete-file-system --file-system-id {handle}"
        found.append(RemainingResources(f"FSx for Lustre file system {handle}", command, costs=True))
    return found


def optional(ask: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    try:
        return ask()
    except ApiError:
        return None
