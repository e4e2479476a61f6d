"""Helm's record of a release: its stages, and how far Helm has come with them.

Read through pyhelm3, whose ``get_current_revision`` is one ``helm status`` of Helm 3 or 4 and returns the hooks with
their phases. Not read from Helm's Secrets, which $HELM_DRIVER may store elsewhere. pyhelm3's other ways to a release
(get_proceedable_revision and its callers) roll back or uninstall, so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml

from genvalues.cluster.helm_records import INNER_ENVIRONMENT
from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import COMPONENT, INNER_SUFFIX, RUNNER, STAGE, annotations_of, labels_of, name_of
from genvalues.cluster.workloads import NAMES
from genvalues.common import helm
from genvalues.common.dicts import get
from genvalues.common.rendered_yaml import load_rendered


@dataclass(frozen=True)
class HelmHook:
    """A hook of a release. ``phase`` is Helm's: Unknown until the hook starts in this revision."""

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
        """The stage that it belongs to, with -gate at the end for a gate; empty for other hooks."""
        is_stage = {"post-install", "post-upgrade"} & set(self.events) and self.kind in ("Job", *NAMES)
        return annotations_of(self.manifest).get(STAGE, "") if is_stage else ""

    @property
    def weight(self) -> int:
        return int(annotations_of(self.manifest).get("helm.sh/hook-weight") or 0)

    @property
    def has_started(self) -> bool:
        return self.phase != "Unknown"


@dataclass(frozen=True)
class HelmRecord:
    """The newest revision of a release. ``status`` is Helm's word: deployed, failed, pending-install, ..."""

    release: str
    namespace: str
    revision: int
    status: str
    updated: datetime
    hooks: tuple[HelmHook, ...]
    resources: tuple[Object, ...]  # objects that are not hooks, as rendered

    @property
    def is_pending(self) -> bool:
        return self.status.startswith("pending-")

    @property
    def runner(self) -> str:
        """The name of the Job that runs the stages in mode detached; empty in mode attached."""
        jobs = [item for item in self.resources if item["kind"] == "Job" and labels_of(item).get(COMPONENT) == RUNNER]
        return name_of(jobs[0]) if jobs else ""

    @property
    def mode(self) -> str:
        return "detached" if self.runner else "attached"

    def config(self, file: str) -> dict[str, Any]:
        """A file of the release's ConfigMap (run.yaml, cluster.yaml, values.yaml); {} if it is not a YAML mapping."""
        maps = [item for item in self.resources if item["kind"] == "ConfigMap"]
        text = next((item["data"][file] for item in maps if file in (item.get("data") or {})), "")
        try:
            found = load_rendered(text)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def cluster_config(self) -> dict[str, Any]:
        """cluster.yaml, in which the chart describes the release."""
        return self.config("cluster.yaml")

    @property
    def claim(self) -> str:
        """The name of the volume's claim."""
        return get(self.cluster_config, "claim.name", str) or f"{self.release}-workspace"


def find_record(release: str, namespace: str, context: str | None) -> HelmRecord | None:
    """Return the release's newest revision; None if the release does not exist.

    The runner keeps the records of an inner release in ConfigMaps.
    """
    found = None
    if release.endswith(INNER_SUFFIX):
        found = helm.revision(release, namespace, context, INNER_ENVIRONMENT)
    found = found or helm.revision(release, namespace, context)
    if found is None:
        return None
    revision, hooks, resources = found
    return HelmRecord(
        release=release,
        namespace=namespace,
        revision=revision.revision,
        status=revision.status.value,
        updated=revision.updated,
        hooks=tuple(
            HelmHook(hook.resource, tuple(event.value for event in hook.events), hook.phase.value) for hook in hooks
        ),
        resources=tuple(resources),
    )


def require_record(release: str, namespace: str, context: str | None) -> HelmRecord:
    """Return the release's newest revision. Raises NoSuchRelease."""
    found = find_record(release, namespace, context)
    if found is None:
        raise helm.NoSuchRelease(release, namespace, helm.releases(namespace, context))
    return found
