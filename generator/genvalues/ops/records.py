"""What Helm knows of a release: its stages, and how far it has come with them.

By pyhelm3, whose ``get_current_revision`` is one ``helm status`` of Helm 3 or 4 and has the hooks with the phase of
each; not from Helm's Secrets, which are not where $HELM_DRIVER says otherwise. pyhelm3's other ways to a release
(get_proceedable_revision and what uses it) roll back or uninstall, and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genvalues.cluster.objects import COMPONENT, STAGE, annotations_of, labels_of, name_of
from genvalues.common import helm

Object = dict[str, Any]


@dataclass(frozen=True)
class Hook:
    """A hook of a release. ``phase`` is Helm's: Unknown as long as it has not begun in this revision."""

    manifest: Object
    events: tuple[str, ...]
    phase: str = "Unknown"

    @property
    def name(self) -> str:
        return name_of(self.manifest)

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def stage(self) -> str:
        return annotations_of(self.manifest).get(STAGE, "")

    @property
    def weight(self) -> int:
        return int(annotations_of(self.manifest).get("helm.sh/hook-weight") or 0)

    @property
    def begun(self) -> bool:
        return self.phase != "Unknown"


@dataclass(frozen=True)
class Record:
    """The newest revision of a release. ``status`` is Helm's word: deployed, failed, pending-install ..."""

    release: str
    namespace: str
    revision: int
    status: str
    updated: float  # seconds since 1970
    description: str
    hooks: tuple[Hook, ...]
    resources: tuple[Object, ...]  # ordinary objects, as rendered

    @property
    def is_pending(self) -> bool:
        return self.status.startswith("pending-")

    @property
    def runner(self) -> str:
        """The name of the Job that runs the stages in mode detached, else nothing."""
        runners = [item for item in self.resources if labels_of(item).get(COMPONENT) == "runner"]
        return next((name_of(item) for item in runners if item["kind"] == "Job"), "")

    @property
    def mode(self) -> str:
        return "detached" if self.runner else "attached"

    def config(self, file: str) -> str:
        """A file of the release's ConfigMap (run.yaml, cluster.yaml), or nothing."""
        maps = [item for item in self.resources if item["kind"] == "ConfigMap"]
        return next((item["data"][file] for item in maps if file in (item.get("data") or {})), "")


def find_record(release: str, namespace: str, context: str | None) -> Record | None:
    """The release's newest revision; None when there is no such release."""
    found = helm.revision(release, namespace, context)
    if found is None:
        return None
    status, hooks, resources = found
    return Record(
        release=release,
        namespace=namespace,
        revision=status.revision,
        status=status.status.value,
        updated=status.updated.timestamp(),
        description=status.description or "",
        hooks=tuple(
            Hook(hook.resource, tuple(event.value for event in hook.events), hook.phase.value) for hook in hooks
        ),
        resources=tuple(item for item in resources if item),
    )


def need_record(release: str, namespace: str, context: str | None) -> Record:
    found = find_record(release, namespace, context)
    if found is None:
        raise helm.NoSuchRelease(release, namespace, helm.releases(namespace, context))
    return found
