"""Uninstall a release: say what will be stopped, run Helm, report what remains and what it costs."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.kinds import ApiError
from genvalues.cluster.kinds import Kind as ApiKind
from genvalues.cluster.objects import family_of
from genvalues.common.dicts import get
from genvalues.common.errors import UserError
from genvalues.common.helm import STDERR, place_arguments, run_helm, user_values
from genvalues.ops.records import HelmRecord, find_record
from genvalues.ops.redact import hide_secrets
from genvalues.ops.status import ReleaseStatus, ReleaseWatcher, api_errors_as_user_errors

log = logging.getLogger(__name__)

VOLUMES = ApiKind("api/v1", "persistentvolumes", namespaced=False)
# What the cleanup hook takes besides cleanup.timeoutSeconds: 130 s until its pod has started and 20 s (the chart's
# cleanup/_job.tpl). The rest is for what Helm itself removes.
BEYOND_CLEANUP = 270
CLEANUP_SECONDS = 180  # the chart's default


@dataclass(frozen=True)
class RemainingResource:
    """Something that uninstall does not remove, and the command that does."""

    what: str
    command: str
    costs: bool = False  # money, until it is removed


@dataclass(frozen=True)
class UninstallReport:
    release: str
    namespace: str
    uninstalled: bool
    stays: tuple[RemainingResource, ...] = ()

    @property
    def exit_status(self) -> int:
        return 0 if self.uninstalled else 1

    def lines(self) -> list[str]:
        if not self.stays:
            return []
        lines = ["Not removed:"]
        for one in self.stays:
            lines.append(f"  {one.what}{' (costs money until it is removed)' if one.costs else ''}")
            lines.append(f"    to remove it: {one.command}")
        return lines


def uninstall(watcher: ReleaseWatcher, confirm: Callable[[str], bool]) -> UninstallReport:
    """Uninstall the release if ``confirm`` agrees. Raises UserError for an inner release, and as the watcher does."""
    release, namespace, context = watcher.release, watcher.server.namespace, watcher.context
    record = watcher.record()
    refuse_inner_release(record, context)
    status = watcher.status()
    with api_errors_as_user_errors(namespace):
        remaining = remaining_resources(watcher.server, record)
    values = user_values(release, namespace, context, computed=True)
    for line in what_will_stop(status):
        log.info(line)
    if not confirm(f"Uninstall {release} in {namespace}?"):
        log.info("Nothing was changed.")
        return UninstallReport(release, namespace, uninstalled=False)
    seconds = int(get(values, "cleanup.timeoutSeconds", int) or CLEANUP_SECONDS) + BEYOND_CLEANUP
    arguments = ["uninstall", release, *place_arguments(namespace, context), "--timeout", f"{seconds}s"]
    log.info("Running: helm %s", shlex.join(arguments))
    if run_helm(arguments, hide=hide_secrets, output=STDERR):
        look = f"genvalues status {release} --namespace {namespace}"
        by_hand = 'docs/operations.md, "uninstall by hand"'
        log.error(
            "%s was not uninstalled. See what runs: %s. If its image cannot be pulled: %s", release, look, by_hand
        )
        return UninstallReport(release, namespace, uninstalled=False)
    return UninstallReport(release, namespace, uninstalled=True, stays=tuple(remaining))


def refuse_inner_release(record: HelmRecord, context: str | None) -> None:
    """Refuse RELEASE-run of a detached release: its runner would install it again."""
    outer = family_of(record.release)
    owner = find_record(outer, record.namespace, context) if outer != record.release else None
    if owner is not None and owner.runner:
        raise UserError(
            f"is installed by the runner of {outer} and is uninstalled with it",
            where=record.release,
            fix=f"Run: genvalues uninstall {outer} --namespace {record.namespace}",
        )


def what_will_stop(status: ReleaseStatus) -> list[str]:
    running = [stage for stage in status.all_stages if stage.state == "running"]
    if not running:
        return [f"No stage of {status.release} is running."]
    lines = []
    for stage in running:
        progress = stage.progress or {}
        at = f" at step {progress['step']} of {progress.get('totalSteps')}" if "step" in progress else ""
        pods = f" ({', '.join(stage.pods)})" if stage.pods else ""
        lines.append(f"Will be stopped: {stage.name}{at}{pods}")
    if any(stage.name == "train" for stage in running):
        lines.append("Training saves a checkpoint before it stops, and resumes there after the next install.")
    return lines


# --- what remains, read before it is uninstalled


def remaining_resources(server: Api, record: HelmRecord) -> list[RemainingResource]:
    """The volume's claim, what the release created for it, and the Secret with the token."""
    kubectl = f"kubectl -n {record.namespace} delete"
    found = remaining_claim(server, record, kubectl)
    for item in record.resources:
        if item["kind"] == "StorageClass":
            name = item["metadata"]["name"]
            found.append(RemainingResource(f"storage class {name}", f"kubectl delete storageclass {name}"))
    if secret := get(record.cluster_config, "secret.name", str):
        what = f"secret {secret}, your Hugging Face token"
        found.append(RemainingResource(what, f"{kubectl} secret {secret}"))
    return found


def remaining_claim(server: Api, record: HelmRecord, kubectl: str) -> list[RemainingResource]:
    name, is_managed = record.claim, get(record.cluster_config, "claim.managed", bool)
    claim = optional(lambda: server.get(kinds.CLAIMS, name))
    if claim is None:
        what = f"claim {name}, if it exists (it could not be read)"
        return [RemainingResource(what, f"{kubectl} pvc {name}", costs=True)] if is_managed else []
    size = get(claim, "status.capacity.storage", str) or get(claim, "spec.resources.requests.storage", str) or "?"
    storage_class = get(claim, "spec.storageClassName", str)
    of_class = f", storage class {storage_class}" if storage_class else ""
    not_ours = "" if is_managed else ", not created by this release (storage.existingClaim)"
    what = f"claim {name}, {size}{of_class}{not_ours}: models, datasets and results of every run"
    return [RemainingResource(what, f"{kubectl} pvc {name}", costs=True), *remaining_volume(server, claim)]


def remaining_volume(server: Api, claim: dict[str, Any]) -> list[RemainingResource]:
    """The claim's volume if it is kept when the claim is deleted, and the file system behind it."""
    name = get(claim, "spec.volumeName", str)
    if not name:
        return []
    delete = f"kubectl delete pv {name}"
    volume = optional(lambda: server.get(VOLUMES, name))
    if volume is None:
        what = f"volume {name}, which could not be read and may be kept when its claim is deleted"
        return [RemainingResource(what, delete, costs=True)]
    if get(volume, "spec.persistentVolumeReclaimPolicy", str) != "Retain":
        return []  # deleted with its claim
    found = [RemainingResource(f"volume {name}, which is kept when its claim is deleted", delete)]
    handle = get(volume, "spec.csi.volumeHandle", str)
    if get(volume, "spec.csi.driver", str) == "fsx.csi.aws.com" and handle:
        command = f"aws fsx delete-file-system --file-system-id {handle}"
        found.append(RemainingResource(f"FSx for Lustre file system {handle}", command, costs=True))
    return found


def optional(request: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    try:
        return request()
    except ApiError:
        return None
